"""A database's position in its binary log, and in those of its replication sources, at the moment of a snapshot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from blockdiff.shared.errors import DatabaseError, UsageError, printable
from blockdiff.shared.fields import Fields

Row = Mapping[str, object]
#: Executes a statement and returns its rows, by the names of their columns.
Rows = Callable[[str], list[Row]]

#: Most characters of a version that a database reports, and of any other text.
_VERSION_LENGTH = 200
_LENGTH = 1000
#: Most characters of a set of GTIDs, which may contain line ends, and the columns that have such sets.
_GTID_LENGTH = 1 << 20
_GTIDS = ("gtid", "Value", "Gtid_Slave_Pos", "Executed_Gtid_Set")
#: Most digits of a number of 64 bits.
_DIGITS = 19
#: Most sources of a replica.
_CHANNELS = 1000
_ODD = "is it a MySQL or MariaDB server?"

MARIADB = "mariadb"
MYSQL = "mysql"


@dataclass(frozen=True)
class Version:
    """The version of a server: its whole text, the flavour (`MARIADB` or `MYSQL`), and the three numbers."""

    text: str
    flavour: str
    numbers: tuple[int, int, int]

    @classmethod
    def parse(cls, text: str) -> "Version":
        """Return the version from the result of ``SELECT VERSION()``; raises `DatabaseError`."""
        if len(text) > _VERSION_LENGTH or not text.isprintable():
            raise DatabaseError(f"the database calls its version {printable(text, 100)!r}, which is not a version")
        flavour = MARIADB if "mariadb" in text.lower() else MYSQL
        # MariaDB's protocol shows old clients its version with this prefix, and some proxies pass it on
        numbers = text.removeprefix("5.5.5-").partition("-")[0].split(".")
        if len(numbers) < 3 or not all(_is_number(number, 3) for number in numbers[:3]):
            raise DatabaseError(f"the database calls its version {printable(text, 100)!r}, which is not understood")
        return cls(text, flavour, (int(numbers[0]), int(numbers[1]), int(numbers[2])))

    def is_mysql(self, *since: int) -> bool:
        """Whether this is MySQL of this version or newer."""
        return self.flavour == MYSQL and self.numbers >= since

    def is_mariadb(self, *since: int) -> bool:
        """Whether this is MariaDB of this version or newer."""
        return self.flavour == MARIADB and self.numbers >= since


@dataclass(frozen=True)
class Channel:
    """The progress of a replica with one source: it has executed everything up to `position` (bytes) of its `file`."""

    name: str
    source_host: str
    source_port: int
    file: str
    position: int
    gtid: str | None


@dataclass(frozen=True)
class Applier:
    """The thread that applies the changes of one source: its channel, whether it runs, and whether changes arrive."""

    channel: str
    is_running: bool
    is_receiving: bool


@dataclass(frozen=True)
class Coordinates:
    """The server's position. `binlog_position` is in bytes; it and `binlog_file` are None if there is no binary log.

    `gtid` is MariaDB's ``gtid_binlog_pos`` or MySQL's ``gtid_executed``, and None if the server uses no GTIDs or writes
    no binary log. A manifest contains the fields as `dataclasses.asdict` returns them; `from_fields` reads them.
    """

    server_version: str
    flavour: str
    binlog_file: str | None
    binlog_position: int | None
    gtid: str | None
    replica_channels: tuple[Channel, ...]


def read(rows: Rows) -> Coordinates:
    """Ask the server for its position. Raises `DatabaseError`, for example if the login lacks a privilege for this."""
    version = Version.parse(_text(rows("SELECT VERSION() AS version")[0], "version"))
    file, place = position(rows, version)
    channels = rows(_replica_status(version))
    if len(channels) > _CHANNELS:
        raise DatabaseError(f"the database says that it replicates {len(channels)} sources", _ODD)
    return Coordinates(
        server_version=version.text,
        flavour=version.flavour,
        binlog_file=file,
        binlog_position=place,
        gtid=_gtid(rows, version) if file is not None else None,
        replica_channels=tuple(_channel(row) for row in channels),
    )


def position(rows: Rows, version: Version) -> tuple[str | None, int | None]:
    """Ask only for file and position of the binary log; both are None if there is none. Raises what `read` raises."""
    log = _log(rows, version)
    return (_text(log[0], "File"), _number(log[0], "Position")) if log else (None, None)


def appliers(rows: Rows, version: Version) -> list[Applier]:
    """Return the applier of each source that the server replicates. Raises what `read` raises."""
    return [
        Applier(
            _text(row, "Connection_name", "Channel_Name", default=""),
            _text(row, "Replica_SQL_Running", "Slave_SQL_Running") == "Yes",
            _text(row, "Replica_IO_Running", "Slave_IO_Running") != "No",
        )
        for row in rows(_replica_status(version))
    ]


def applier_statement(verb: str, version: Version, channel: str) -> str:
    """Return the statement that starts or stops (`verb`: START or STOP) the applier of a channel, for this version."""
    if version.flavour == MARIADB:
        return f"{verb} SLAVE {_quoted(channel)} SQL_THREAD"
    noun = "REPLICA" if version.is_mysql(8, 0, 22) else "SLAVE"
    return f"{verb} {noun} SQL_THREAD FOR CHANNEL {_quoted(channel)}"


def _log(rows: Rows, version: Version) -> list[Row]:
    return rows("SHOW BINARY LOG STATUS" if version.is_mysql(8, 2) else "SHOW MASTER STATUS")


def _replica_status(version: Version) -> str:
    if version.flavour == MARIADB:
        return "SHOW ALL SLAVES STATUS"
    return "SHOW REPLICA STATUS" if version.is_mysql(8, 0, 22) else "SHOW SLAVE STATUS"


def _gtid(rows: Rows, version: Version) -> str | None:
    if version.flavour == MARIADB:
        return _text(rows("SELECT @@GLOBAL.gtid_binlog_pos AS gtid")[0], "gtid") or None
    variables = {
        _text(row, "Variable_name"): _text(row, "Value")
        for row in rows("SHOW GLOBAL VARIABLES WHERE Variable_name IN ('gtid_mode', 'gtid_executed')")
    }
    return _joined(variables.get("gtid_executed", "")) if variables.get("gtid_mode") == "ON" else None


def _channel(row: Row) -> Channel:
    gtid = _text(row, "Gtid_Slave_Pos", "Executed_Gtid_Set", default="")
    return Channel(
        name=_text(row, "Connection_name", "Channel_Name", default=""),
        source_host=_text(row, "Source_Host", "Master_Host"),
        source_port=_number(row, "Source_Port", "Master_Port"),
        file=_text(row, "Relay_Source_Log_File", "Relay_Master_Log_File"),
        position=_number(row, "Exec_Source_Log_Pos", "Exec_Master_Log_Pos"),
        gtid=_joined(gtid),
    )


def _joined(gtid: str) -> str | None:
    """Return a set of GTIDs on one line, because MySQL breaks long ones; None if it is empty."""
    return "".join(gtid.split()) or None


def _text(row: Row, *names: str, default: str | None = None) -> str:
    """Return a column by the first of `names` that the row has: they differ between versions.

    A text that is too long or not printable is refused, because a manifest contains it, and commands show it.
    """
    for name in names:
        if name in row:
            value = row[name]
            text = value.decode("utf-8", "replace") if isinstance(value, bytes) else "" if value is None else str(value)
            shown, limit = (text.replace("\n", ""), _GTID_LENGTH) if name in _GTIDS else (text, _LENGTH)
            if len(text) > limit or not shown.isprintable():
                raise DatabaseError(f"the database says {name}={printable(text, 100)!r} ({len(text)} characters)", _ODD)
            return text
    if default is not None:
        return default
    raise DatabaseError(f"the database says nothing of {names[0]}", "is its version supported?")


def _number(row: Row, *names: str) -> int:
    text = _text(row, *names)
    if not _is_number(text, _DIGITS) or int(text) >= 1 << 63:
        raise DatabaseError(f"the database says {names[0]}={printable(text, 100)!r}, which is not a number")
    return int(text)


def _is_number(text: str, digits: int) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= digits


def from_fields(given: Fields) -> Coordinates:
    """Return the coordinates in a manifest. The error for a field that is not valid names it."""
    _have_exactly(given, Coordinates, "coordinates")
    flavour = given.text("flavour")
    given.check("flavour", flavour in (MARIADB, MYSQL))
    given.check("binlog_position", given.has("binlog_file") == given.has("binlog_position"))
    return Coordinates(
        server_version=given.text("server_version"),
        flavour=flavour,
        binlog_file=given.optional(given.text, "binlog_file"),
        binlog_position=given.optional(given.count, "binlog_position"),
        gtid=given.optional(given.text, "gtid"),
        replica_channels=tuple(map(_channel_from_fields, given.parts("replica_channels"))),
    )


def _channel_from_fields(given: Fields) -> Channel:
    _have_exactly(given, Channel, "replica_channels")
    return Channel(
        name=given.text("name"),
        source_host=given.text("source_host"),
        source_port=given.count("source_port"),
        file=given.text("file"),
        position=given.count("position"),
        gtid=given.optional(given.text, "gtid"),
    )


def _have_exactly(given: Fields, kind: type[Coordinates] | type[Channel], name: str) -> None:
    """Refuse a JSON object whose fields are not exactly those of a dataclass."""
    given.check(name, set(given.names()) == {field.name for field in fields(kind)})


def replica_statement(coordinates: Coordinates) -> str:
    """Return the SQL that makes a server restored from this generation a replica of the server that was backed up.

    It begins with comments and ends with a line end, and is for the version of that server. Host, user and password of
    the source must be set before it is executed; a comment shows how. Raises `UsageError` if the server wrote no binary
    log, and `DatabaseError` if the coordinates contain control characters.
    """
    if coordinates.binlog_file is None or coordinates.binlog_position is None:
        raise UsageError(
            "the server that was backed up wrote no binary log, so nothing can be its replica",
            "set log_bin and server_id there; the next generation then has coordinates",
        )
    version = Version.parse(coordinates.server_version)
    # a manifest of an older version of blockdiff may contain control characters; SQL has no escapes for most of them
    if not (coordinates.binlog_file + (coordinates.gtid or "")).isprintable():
        raise DatabaseError("the coordinates of this generation contain control characters", _ODD)
    new_words = version.is_mysql(8, 0, 23)
    change, prefix = ("CHANGE REPLICATION SOURCE TO", "SOURCE") if new_words else ("CHANGE MASTER TO", "MASTER")
    settings = []
    lines = [
        f"-- {_name(version)}: a restored copy becomes a replica of the server that was backed up.",
        f"-- Give the copy its own server_id{_new_uuid(version)}, and execute first",
        f"--   {change} {prefix}_USER=..., {prefix}_PASSWORD=..., {prefix}_HOST=...;",
    ]
    if coordinates.gtid and version.flavour == MARIADB:
        lines.append(f"SET GLOBAL gtid_slave_pos={_quoted(coordinates.gtid)};")
        settings.append("MASTER_USE_GTID=slave_pos")
    elif coordinates.gtid:  # gtid_executed is in the data: the copy knows which transactions it has
        lines.append(f"-- its gtid_executed must be {printable(coordinates.gtid, 100_000)}")
        settings.append(f"{prefix}_AUTO_POSITION=1")
    else:
        settings.append(f"{prefix}_LOG_FILE={_quoted(coordinates.binlog_file)}")
        settings.append(f"{prefix}_LOG_POS={coordinates.binlog_position}")
        if version.is_mariadb(10, 0):
            settings.append("MASTER_USE_GTID=no")
    lines.append(f"{change} {', '.join(settings)};")
    lines.append(f"-- and then {'START REPLICA' if new_words else 'START SLAVE'};")
    return "\n".join(lines) + "\n"


def _name(version: Version) -> str:
    return f"{'MariaDB' if version.flavour == MARIADB else 'MySQL'} {'.'.join(map(str, version.numbers))}"


def _new_uuid(version: Version) -> str:
    return " and delete its auto.cnf (it holds the server_uuid)" if version.flavour == MYSQL else ""


def _quoted(text: str) -> str:
    """Return a string literal of SQL, on one line."""
    escaped = (
        text.replace("\\", "\\\\").replace("'", "''").replace("\n", "\\n").replace("\r", "\\r").replace("\0", "\\0")
    )
    return f"'{escaped}'"
