"""Sessions with MySQL and MariaDB: accounts, logins, the server's files, and its position in the binary log."""
