"""Where a database keeps its files, as the server reports it.

The server does not report everything: MariaDB does not list tables that were not opened since its start, and for other
engines a login sees only the tables that it may read. So the agent also looks on the host (`blockdiff.host.datadir`).
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass

from blockdiff.database.coordinates import Row, Rows

#: Variables with the directories of the storage engines' data and logs; empty or relative: in the data directory.
_DIRECTORIES = (
    *("innodb_data_home_dir", "innodb_log_group_home_dir", "innodb_undo_directory", "innodb_doublewrite_dir"),
    *("aria_log_dir_path", "rocksdb_datadir", "rocksdb_wal_dir", "tokudb_data_dir", "tokudb_log_dir"),
)
#: Variables with files that a server can start without, and what these are.
_OTHERS = {
    "log_bin_basename": "the binary logs",
    "relay_log_basename": "the relay logs",
    "file_key_management_filename": "the keys of encrypted tables",
    "keyring_file_data": "the keys of encrypted tables",
}
#: The values of these are the beginning of file names, so only their directory is used.
_BASENAMES = ("log_bin_basename", "relay_log_basename")
_UNLOGGED = ("MyISAM", "Aria", "CSV", "ARCHIVE")
_SYSTEM = ("mysql", "sys", "performance_schema", "information_schema")
_TEMPORARY = ("tmpdir", "innodb_tmpdir", "slave_load_tmpdir", "replica_load_tmpdir")
_VARIABLES = ("datadir", "innodb_data_file_path", *_DIRECTORIES, *_OTHERS, *_TEMPORARY)
#: Tables and columns with the paths of InnoDB's files (they differ between versions), and a condition for the rows.
_TABLESPACES = {
    "INNODB_SYS_TABLESPACES.FILENAME": "NAME <> 'innodb_temporary'",
    "INNODB_SYS_DATAFILES.PATH": "TRUE",
    "INNODB_DATAFILES.PATH": "TRUE",
    "FILES.FILE_NAME": "FILE_TYPE <> 'TEMPORARY'",
}


@dataclass(frozen=True)
class Files:
    """Absolute paths of files and directories.

    `needed` are those that recovery needs, the data directory first. `others` are those that it does not need, each
    with what it is. `temporary` are those that nothing needs.
    """

    needed: tuple[str, ...]
    others: tuple[tuple[str, str], ...] = ()
    temporary: tuple[str, ...] = ()


def read(rows: Rows) -> Files:
    """Ask the server. Raises `DatabaseError`; a login without PROCESS may not see the list of InnoDB's files."""
    wanted = ", ".join(f"'{name}'" for name in _VARIABLES)
    found = rows(f"SHOW GLOBAL VARIABLES WHERE Variable_name IN ({wanted})")
    variables = {_text(row, "Variable_name"): _text(row, "Value") for row in found}
    data = variables["datadir"]

    def absolute(*parts: str) -> str:
        return os.path.normpath(os.path.join(data, *parts))

    home = variables.get("innodb_data_home_dir", "")
    files = [part.partition(":")[0] for part in variables.get("innodb_data_file_path", "").split(";") if part]
    needed = [absolute(), *(absolute(variables.get(name, "")) for name in _DIRECTORIES)]
    needed += [absolute(home, os.path.dirname(name)) for name in files]
    needed += [absolute(directory) for directory in _tablespaces(rows)]
    others = [
        (absolute(os.path.dirname(value) if name in _BASENAMES else value), what)
        for name, what in _OTHERS.items()
        if (value := variables.get(name, ""))
    ]
    temporary = [path for name in _TEMPORARY for path in variables.get(name, "").split(":") if path]
    return Files(_once(needed), tuple(dict.fromkeys(others)), _once(map(absolute, temporary)))


def unlogged(rows: Rows) -> bool | None:
    """Return whether there are tables, besides the server's own, of engines without transactions.

    None if it sees no such table but may not see all tables. Raises `DatabaseError`.
    """
    engines, system = (", ".join(f"'{name}'" for name in names) for names in (_UNLOGGED, _SYSTEM))
    found = rows(
        "SELECT 1 FROM information_schema.TABLES WHERE TABLE_TYPE = 'BASE TABLE'"
        f" AND ENGINE IN ({engines}) AND TABLE_SCHEMA NOT IN ({system}) LIMIT 1"
    )
    if found:
        return True
    return False if rows("SELECT 1 FROM information_schema.USER_PRIVILEGES WHERE PRIVILEGE_TYPE = 'SELECT'") else None


def _tablespaces(rows: Rows) -> list[str]:
    """Return the directories of those InnoDB files that the server lists by a path that does not begin with ``./``."""
    names = ", ".join(f"'{name}'" for name in _TABLESPACES)
    columns = rows(
        "SELECT CONCAT(TABLE_NAME, '.', COLUMN_NAME) AS name FROM information_schema.COLUMNS"
        f" WHERE TABLE_SCHEMA = 'information_schema' AND CONCAT(TABLE_NAME, '.', COLUMN_NAME) IN ({names})"
    )
    found = []
    for name in (_text(row, "name") for row in columns):
        table, _, column = name.partition(".")
        directory = f"LEFT({column}, CHAR_LENGTH({column}) - CHAR_LENGTH(SUBSTRING_INDEX({column}, '/', -1)))"
        statement = f"SELECT DISTINCT {directory} AS directory FROM information_schema.{table}"
        where = f"{column} IS NOT NULL AND {column} NOT LIKE './%' AND {_TABLESPACES[name]}"
        found += [_text(row, "directory") for row in rows(f"{statement} WHERE {where}")]
    return found


def _text(row: Row, name: str) -> str:
    value = row.get(name)
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else "" if value is None else str(value)


def _once(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(paths))
