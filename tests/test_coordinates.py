"""Coordinates: from a real MariaDB and its replica, and from recorded rows of MySQL, which is on no test machine."""

import json
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from blockdiff import mysqllock
from blockdiff.database import coordinates
from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Channel, Coordinates, Row, Version, replica_statement
from blockdiff.shared.errors import DatabaseError, UsageError
from blockdiff.shared.fields import Fields
from tests.conftest import require
from tests.mariadb import MariaDB, execute, wait_for

MARIADB = Coordinates("10.11.19-MariaDB-log", "mariadb", "binlog.000007", 4711, "0-1-42", ())
MYSQL = Coordinates("8.4.3", "mysql", "binlog.000007", 4711, None, ())
UUID = "3e11fa47-71ca-11e1-9e33-c80aa9429562"


def server(version: str, **answers: list[Row]) -> Callable[[str], list[Row]]:
    """Return a server that knows its version and just these statements: their words up to WHERE, joined."""

    def rows(statement: str) -> list[Row]:
        if statement == "SELECT VERSION() AS version":
            return [{"version": version}]
        return answers[statement.partition(" WHERE")[0].replace(" ", "_")]

    return rows


OLD_ROW = {
    "Master_Host": "db00",
    "Master_Port": 3306,
    "Master_Log_File": "binlog.000009",
    "Read_Master_Log_Pos": 999,
    "Relay_Master_Log_File": "binlog.000008",
    "Exec_Master_Log_Pos": 500,
    "Executed_Gtid_Set": "",
    "Channel_Name": "",
}
NEW_ROW = {
    "Source_Host": "db00",
    "Source_Port": 3306,
    "Source_Log_File": "binlog.000009",
    "Read_Source_Log_Pos": 999,
    "Relay_Source_Log_File": "binlog.000008",
    "Exec_Source_Log_Pos": 500,
    "Executed_Gtid_Set": f"{UUID}:1-5,\n{UUID}:7",
    "Channel_Name": "from db00",
}
LOG: list[Row] = [{"File": "binlog.000007", "Position": 4711, "Binlog_Do_DB": "", "Executed_Gtid_Set": ""}]


def gtid(mode: str, executed: str) -> list[Row]:
    return [{"Variable_name": "gtid_mode", "Value": mode}, {"Variable_name": "gtid_executed", "Value": executed}]


@pytest.mark.parametrize(
    ("version", "names", "row"),
    [
        ("5.6.51-log", ("SHOW_MASTER_STATUS", "SHOW_SLAVE_STATUS"), OLD_ROW),
        ("8.0.21", ("SHOW_MASTER_STATUS", "SHOW_SLAVE_STATUS"), OLD_ROW),
        ("8.0.22-13", ("SHOW_MASTER_STATUS", "SHOW_REPLICA_STATUS"), NEW_ROW),
        ("8.2.0", ("SHOW_BINARY_LOG_STATUS", "SHOW_REPLICA_STATUS"), NEW_ROW),
        ("9.1.0-commercial", ("SHOW_BINARY_LOG_STATUS", "SHOW_REPLICA_STATUS"), NEW_ROW),
    ],
)
def test_mysql_is_asked_in_the_words_of_its_version(version: str, names: tuple[str, str], row: Row) -> None:
    log, replicas = names
    answers: dict[str, list[Row]] = {log: LOG, replicas: [row, row], "SHOW_GLOBAL_VARIABLES": gtid("OFF", "")}
    found = coordinates.read(server(version, **answers))
    assert (found.server_version, found.flavour) == (version, "mysql")
    assert (found.binlog_file, found.binlog_position, found.gtid) == ("binlog.000007", 4711, None)
    new = row is NEW_ROW
    channel = Channel(
        "from db00" if new else "", "db00", 3306, "binlog.000008", 500, f"{UUID}:1-5,{UUID}:7" if new else None
    )
    assert found.replica_channels == (channel, channel)


@pytest.mark.parametrize(
    ("mode", "executed", "expected"),
    [("ON", f"{UUID}:1-5,\n{UUID}:7", f"{UUID}:1-5,{UUID}:7"), ("ON", "", None), ("ON_PERMISSIVE", f"{UUID}:1", None)],
)
def test_mysql_has_gtids_where_it_uses_nothing_else(mode: str, executed: str, expected: str | None) -> None:
    rows = server(
        "8.4.3", SHOW_BINARY_LOG_STATUS=LOG, SHOW_REPLICA_STATUS=[], SHOW_GLOBAL_VARIABLES=gtid(mode, executed)
    )
    assert coordinates.read(rows).gtid == expected


def test_mysql_without_a_binary_log_has_no_position() -> None:
    found = coordinates.read(server("8.4.3", SHOW_BINARY_LOG_STATUS=[], SHOW_REPLICA_STATUS=[]))
    assert (found.binlog_file, found.binlog_position, found.gtid) == (None, None, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"Position": 4}, "the database says nothing of File"),
        ({"File": "binlog.000001", "Position": "-1"}, "says Position='-1', which is not a number"),
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error(row: Row, message: str) -> None:
    with pytest.raises(DatabaseError, match=message):
        coordinates.read(server("8.4.3", SHOW_BINARY_LOG_STATUS=[row], SHOW_REPLICA_STATUS=[]))


@pytest.mark.parametrize(
    ("text", "flavour", "numbers"),
    [
        ("10.11.19-MariaDB-0+deb12u1-log", "mariadb", (10, 11, 19)),
        ("5.5.5-10.4.12-MariaDB", "mariadb", (10, 4, 12)),
        ("5.5.5", "mysql", (5, 5, 5)),
        ("8.0.36-28.1", "mysql", (8, 0, 36)),
    ],
)
def test_a_version_is_read(text: str, flavour: str, numbers: tuple[int, int, int]) -> None:
    assert Version.parse(text) == Version(text, flavour, numbers)


@pytest.mark.parametrize("text", ["", "8.4", "eight.four.three", "8.4.²"])
def test_a_version_that_is_none_is_an_error(text: str) -> None:
    with pytest.raises(DatabaseError, match="which is not understood"):
        Version.parse(text)


# --- the fields of a manifest


FULL = replace(MARIADB, replica_channels=(Channel("", "db00", 3306, "binlog.000001", 4, None),) * 2)


@pytest.mark.parametrize("given", [FULL, MYSQL, replace(MYSQL, binlog_file=None, binlog_position=None)])
def test_coordinates_survive_json(given: Coordinates) -> None:
    assert coordinates.from_fields(Fields(json.loads(json.dumps(asdict(given))), ValueError)) == given


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"binlog_position": "4711"}, "binlog_position"),
        ({"binlog_position": -1}, "binlog_position"),
        ({"binlog_position": True}, "binlog_position"),
        ({"binlog_position": None}, "binlog_position"),
        ({"binlog_file": None}, "binlog_position"),
        ({"binlog_file": 7}, "binlog_file"),
        ({"server_version": None}, "server_version"),
        ({"flavour": "oracle"}, "flavour"),
        ({"flavour": []}, "flavour"),
        ({"gtid": 1}, "gtid"),
        ({"more": 1}, "coordinates"),
        ({"replica_channels": {}}, "replica_channels"),
        ({"replica_channels": [{}]}, "replica_channels"),
        ({"replica_channels": [7]}, "replica_channels"),
        ({"replica_channels": [{**asdict(FULL.replica_channels[0]), "source_port": "x"}]}, "source_port"),
        ({"replica_channels": [{**asdict(FULL.replica_channels[0]), "gtid": 1}]}, "gtid"),
    ],
)
def test_fields_that_are_wrong_are_named(change: dict[str, object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}$"):
        coordinates.from_fields(Fields({**asdict(FULL), **change}, ValueError))


@pytest.mark.parametrize("given", [None, [], "", {}])
def test_what_are_no_fields_at_all_is_an_error(given: object) -> None:
    with pytest.raises(ValueError, match=r"^coordinates$"):
        coordinates.from_fields(Fields(given, ValueError))


# --- the statement for a replica


def statements(text: str) -> list[str]:
    """Return the statements without the comments."""
    assert text.startswith("-- ") and text.endswith(";\n")
    return [line for line in text.splitlines() if not line.startswith("-- ")]


MARIADB_GTID = ["SET GLOBAL gtid_slave_pos='0-1-42';", "CHANGE MASTER TO MASTER_USE_GTID=slave_pos;"]
FILE = "LOG_FILE='binlog.000007', {0}_LOG_POS=4711"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (MARIADB, MARIADB_GTID),
        (replace(MARIADB, gtid=None), [f"CHANGE MASTER TO MASTER_{FILE.format('MASTER')}, MASTER_USE_GTID=no;"]),
        (
            replace(MARIADB, gtid=None, server_version="5.5.68-MariaDB"),
            [f"CHANGE MASTER TO MASTER_{FILE.format('MASTER')};"],
        ),
        (MYSQL, [f"CHANGE REPLICATION SOURCE TO SOURCE_{FILE.format('SOURCE')};"]),
        (replace(MYSQL, gtid=f"{UUID}:1-5"), ["CHANGE REPLICATION SOURCE TO SOURCE_AUTO_POSITION=1;"]),
        (replace(MYSQL, server_version="8.0.22"), [f"CHANGE MASTER TO MASTER_{FILE.format('MASTER')};"]),
        (
            replace(MYSQL, server_version="5.7.44", gtid=f"{UUID}:1-5"),
            ["CHANGE MASTER TO MASTER_AUTO_POSITION=1;"],
        ),
    ],
)
def test_a_replica_is_seeded_in_the_dialect_of_the_server(given: Coordinates, expected: list[str]) -> None:
    assert statements(replica_statement(given)) == expected


def test_the_statement_tells_what_a_copy_needs_before() -> None:
    assert "--   CHANGE MASTER TO MASTER_USER=..., MASTER_PASSWORD=..., MASTER_HOST=...;" in replica_statement(MARIADB)
    assert "SOURCE_PASSWORD=..., SOURCE_HOST=...;" in replica_statement(MYSQL)
    assert "its own server_id, and execute" in replica_statement(MARIADB)
    assert "delete its auto.cnf" in replica_statement(MYSQL)


def test_strings_are_quoted() -> None:
    given = replace(MYSQL, binlog_file="it's \\ a file", gtid=None)
    assert "SOURCE_LOG_FILE='it''s \\\\ a file', SOURCE_LOG_POS" in replica_statement(given)


@pytest.mark.parametrize("field", ["binlog_file", "gtid"])
@pytest.mark.parametrize("text", ["x\n; DROP", "\x1b]0;title\x07"])
def test_control_characters_in_a_manifest_of_old_are_not_printed(field: str, text: str) -> None:
    for example in (MYSQL, MARIADB):
        given = replace(example, binlog_file=text) if field == "binlog_file" else replace(example, gtid=text)
        with pytest.raises(DatabaseError, match="contain control characters") as caught:
            replica_statement(given)
        assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("answer", "row", "message"),
    [
        ("log", {"File": "x" * 1001}, r"says File='x+\.\.\.' \(1001 characters\)"),
        ("log", {"File": "binlog\x1b[2J"}, "says File="),
        ("log", {"File": "binlog\n1"}, "says File="),
        ("log", {"Position": "9" * 5000}, "says Position="),
        ("log", {"Position": 1 << 63}, "says Position='9223372036854775808', which is not a number"),
        ("replicas", {"Source_Host": "db\x1b[2J"}, "says Source_Host="),
        ("replicas", {"Executed_Gtid_Set": "a" * ((1 << 20) + 1)}, r"says Executed_Gtid_Set=.* \(1048577 characters\)"),
        ("replicas", {"Executed_Gtid_Set": "a\x1b[2J"}, "says Executed_Gtid_Set="),
    ],
)
def test_what_no_server_says_is_not_recorded(answer: str, row: Row, message: str) -> None:
    log, replicas = ({**LOG[0], **row}, NEW_ROW) if answer == "log" else (LOG[0], {**NEW_ROW, **row})
    rows = server(
        "8.4.3", SHOW_BINARY_LOG_STATUS=[log], SHOW_REPLICA_STATUS=[replicas], SHOW_GLOBAL_VARIABLES=gtid("OFF", "")
    )
    with pytest.raises(DatabaseError, match=message) as caught:
        coordinates.read(rows)
    assert caught.value.message.isprintable() and len(caught.value.message) < 300


def test_more_sources_than_anybody_replicates_are_not_recorded() -> None:
    rows = server(
        "8.4.3",
        SHOW_BINARY_LOG_STATUS=LOG,
        SHOW_REPLICA_STATUS=[NEW_ROW for _ in range(1001)],
        SHOW_GLOBAL_VARIABLES=gtid("OFF", ""),
    )
    with pytest.raises(DatabaseError, match="says that it replicates 1001 sources"):
        coordinates.read(rows)


@pytest.mark.parametrize("text", ["8.4." + "3" * 5000, "8.4.3-" + "x" * 200, "8.4.3\x1b[2J", "8.4.4444"])
def test_a_version_that_is_none_is_refused_in_a_sentence(text: str) -> None:
    with pytest.raises(DatabaseError, match="the database calls its version '") as caught:
        Version.parse(text)
    assert caught.value.message.isprintable() and len(caught.value.message) < 200


def test_a_server_without_a_binary_log_seeds_nothing() -> None:
    with pytest.raises(UsageError, match="wrote no binary log") as caught:
        replica_statement(replace(MARIADB, binlog_file=None, binlog_position=None))
    assert "log_bin" in str(caught.value.hint)


# --- a real server, and its replica


def locked_coordinates(db: MariaDB) -> Coordinates:
    with mysqllock.connect(Account(db.user, "", socket=str(db.socket))) as database, database.locked() as held:
        return held.coordinates()


def test_mariadb_says_where_it_stands(mariadb: MariaDB) -> None:
    found = locked_coordinates(mariadb)
    (log,) = mariadb.run("SHOW MASTER STATUS")
    assert (found.binlog_file, found.binlog_position) == (log["File"], log["Position"])
    assert found.gtid == mariadb.run("SELECT @@gtid_binlog_pos AS gtid")[0]["gtid"]
    assert (found.flavour, found.replica_channels) == ("mariadb", ())


@pytest.mark.parametrize("with_gtid", [True, False], ids=["gtid", "file"])
def test_a_copy_seeded_with_the_statement_follows_its_source(tmp_path: Path, with_gtid: bool) -> None:
    require(MariaDB.available(), "the programs mariadbd and mariadb-install-db")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    with MariaDB(first, "--log-bin=binlog", "--server-id=1") as source:
        source.run("CREATE DATABASE shop", "CREATE TABLE shop.t (n INT PRIMARY KEY)", "INSERT INTO shop.t VALUES (1)")
        source.run(
            "CREATE USER replica@'127.0.0.1' IDENTIFIED BY 'pw'",
            "GRANT REPLICATION SLAVE ON *.* TO replica@'127.0.0.1'",
        )
        found = locked_coordinates(source)
        source.stop()
        shutil.copytree(source.data, second / "data")
        source.start()
        source.run("INSERT INTO shop.t VALUES (2)")
        with MariaDB(second, "--server-id=2", "--gtid-strict-mode=1") as replica:
            if not with_gtid:
                found = replace(found, gtid=None)
            login = f"MASTER_HOST='127.0.0.1', MASTER_PORT={source.port}, MASTER_USER='replica', MASTER_PASSWORD='pw'"
            with closing(replica.connect()) as session:
                execute(session, f"CHANGE MASTER TO {login}, MASTER_CONNECT_RETRY=1")
                execute(session, *statements(replica_statement(found)), "START SLAVE")
            (log,) = source.run("SHOW MASTER STATUS")
            wait_for(lambda: caught_up(replica, log), "a replica that has caught up")
            assert replica.run("SELECT n FROM shop.t ORDER BY n") == [{"n": 1}, {"n": 2}]
            (status,) = replica.run("SHOW SLAVE STATUS")
            assert status["Using_Gtid"] == ("Slave_Pos" if with_gtid else "No")
            seen = locked_coordinates(replica)
            assert (seen.binlog_file, seen.binlog_position, seen.gtid) == (None, None, None)
            (channel,) = seen.replica_channels
            assert (channel.source_host, channel.source_port) == ("127.0.0.1", source.port)
            assert (channel.file, channel.position) == (log["File"], log["Position"])
            assert channel.gtid == source.run("SELECT @@gtid_binlog_pos AS gtid")[0]["gtid"]


def caught_up(replica: MariaDB, log: Row) -> bool:
    (status,) = replica.run("SHOW SLAVE STATUS")
    assert status["Last_SQL_Errno"] == 0, status  # a connection that failed is tried again
    return (status["Relay_Master_Log_File"], status["Exec_Master_Log_Pos"]) == (log["File"], log["Position"])
