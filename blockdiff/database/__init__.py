"""Sessions with MySQL and MariaDB: where its account, its files and its place in the binary log are."""
