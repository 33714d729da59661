"""A Debian guest under qemu with real LVM, sshd, databases and cron."""
