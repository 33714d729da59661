"""A Debian guest on User Mode Linux with real LVM, sshd, databases and cron."""
