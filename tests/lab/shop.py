"""A shop's database on a logical volume of the guest: written to, backed up, and brought to life again from backups."""

import gzip
import json
import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from tests import commands
from tests.lab import binlog, writers
from tests.lab.guest import Guest
from tests.lab.image import PYTHON_PACKAGES
from tests.lab.mariadb import GuestMariaDB
from tests.lab.volumes import VolumeGroup
from tests.mariadb import Server

VOLUME_SIZE = "96M"
TABLES = (*writers.ENGINES, *(f"{engine}_counter" for engine in writers.ENGINES), "account")
SESSIONS = 2
PASSWORD = "secret"
GRANTS = "RELOAD, PROCESS, BINLOG MONITOR, SLAVE MONITOR"
_ACCOUNTS = (
    f"CREATE USER backup@'%' IDENTIFIED BY '{PASSWORD}'",
    f"GRANT {GRANTS} ON *.* TO backup@'%'",
    "CREATE USER replica@'%' IDENTIFIED BY 'replica'",
    "GRANT REPLICATION SLAVE ON *.* TO replica@'%'",
)
_DEADLINE_S = 240

_SERVER = ("--log-bin=binlog", "--binlog-format=ROW", "--innodb-flush-log-at-trx-commit=2")
# a table that was torn must show, not be repaired in silence
_COPY = ("--server-id=2", "--skip-slave-start", "--myisam-recover-options=OFF", "--aria-recover-options=OFF")


@dataclass(frozen=True)
class Shop:
    """A running database whose data lies on `volume`, a logical volume of `group`, mounted at `directory`."""

    group: VolumeGroup
    volume: str
    directory: str
    database: GuestMariaDB

    @property
    def guest(self) -> Guest:
        return self.group.guest

    def backup(
        self, name: Path, *words: str, env: Mapping[str, str] | None = None
    ) -> "tuple[int, dict[str, object], str]":
        """Run a backup of the volume; return its exit status, its summary ({} if it printed none), and what it said."""
        arguments = (self.guest.url(self.volume), *self.arguments(*words))
        result = commands.run("blockdiff", "backup", name, *arguments, env=env, timeout_s=_DEADLINE_S)
        return result.returncode, json.loads(result.stdout or b"{}"), result.stderr.decode()

    def backed_up(self, name: Path, *words: str, env: Mapping[str, str] | None = None) -> "dict[str, object]":
        """Run a backup that must succeed without a word; return its summary."""
        status, summary, said = self.backup(name, *words, env=env)
        assert (status, said) == (0, ""), (status, said)
        return summary

    def arguments(self, *words: str) -> list[str]:
        """Return the options of every backup, and these."""
        options = ["--lvm", "--json", "--digest", "md5", "--snapshot-size", "100%"]
        return [*options, *self.guest.arguments, *words]

    def url(self, login: str = "backup") -> str:
        """Return the URL of the database as it is reached from here."""
        return f"mysql://{login}@127.0.0.1:{self.database.port}/"

    def changes(self) -> int:
        """Return how often LVM has changed the group so far: for every snapshot that was made, if only for a while."""
        return int(self.guest.output(f"vgs --noheadings -o vg_seqno {self.group.name}"))

    def snapshots(self) -> list[str]:
        """Return the names of the group's snapshots, and of the volumes that have some."""
        return [name for name, attributes in self.group.volumes().items() if attributes[0] in "sSoO"]

    def assert_no_snapshot(self) -> None:
        assert self.snapshots() == []


@contextmanager
def opened(guest: Guest, device: str) -> Iterator[Shop]:
    """Yield a shop on a data disk of the guest; its binary log begins with the empty tables."""
    with VolumeGroup(guest, device) as group:
        volume = group.volume("data", VOLUME_SIZE)
        directory = group.mounted(volume)
        with GuestMariaDB(guest, f"{directory}/data", "--server-id=1", *_SERVER) as database:
            database.run(*_ACCOUNTS, *_schema(), "RESET MASTER")
            yield Shop(group, volume, directory, database)


def _schema() -> list[str]:
    """Return the statements that make the tables as they are before anything is written."""
    statements = ["CREATE DATABASE shop"]
    for engine in writers.ENGINES:
        columns = "session INT, n INT, padding VARCHAR(200), PRIMARY KEY (session, n)"
        statements.append(f"CREATE TABLE shop.{engine} ({columns}) ENGINE={engine}")
        statements.append(f"CREATE TABLE shop.{engine}_counter (n INT) ENGINE={engine}")
    statements.append("CREATE TABLE shop.account (id INT PRIMARY KEY, balance BIGINT) ENGINE=InnoDB")
    for table, rows in _rows_at_first().items():
        statements += [f"INSERT INTO shop.{table} VALUES ({', '.join(row)})" for row in rows]
    return statements


def _rows_at_first() -> "dict[str, Counter[tuple[str, ...]]]":
    """Return what is in the tables when the binary log begins."""
    rows: dict[str, Counter[tuple[str, ...]]] = {table: Counter() for table in TABLES}
    for engine in writers.ENGINES:
        rows[f"{engine}_counter"] = Counter([("0",)])
    rows["account"] = Counter((str(number), "0") for number in range(SESSIONS + 1))
    return rows


@contextmanager
def written_to(shop: Shop) -> Iterator[Callable[[], float]]:
    """Write to the shop meanwhile, from several sessions; nothing may go wrong for any of them.

    Yields what returns how long the longest statement took since the last call, in seconds.
    """
    guest = shop.guest
    guest.put("/run/writers.py", Path(writers.__file__).read_bytes())
    command = f"PYTHONPATH={PYTHON_PACKAGES} exec python3 /run/writers.py {shop.database.socket} {SESSIONS}"
    with guest.started(command) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None

        def longest_s() -> float:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())

        assert process.stdout.readline() == "writing\n", process.stderr.read()
        yield longest_s
        said, trouble = process.communicate(timeout=_DEADLINE_S)
        assert (said, trouble) == ("done\n", "")


@contextmanager
def restored_volume(group: VolumeGroup, generation: str, scratch: Path, size: str) -> Iterator[str]:
    """Yield a directory where what was restored from a generation (NAME@N) is mounted, on a volume of its own.

    `scratch` is a directory for the image, `size` the volume's.
    """
    guest, image = group.guest, scratch / "image"
    name = "copy-" + Path(generation).name.partition("@")[0]
    directory = f"/mnt/{group.name}-{name}"
    commands.done("blockdiff", "restore", generation, image)
    guest.put("/run/image.gz", gzip.compress(image.read_bytes(), 1))
    image.unlink()
    volume = group.volume(name, size)
    try:
        guest.run(
            f"blkdiscard -f {volume} && gzip -dc /run/image.gz | dd of={volume} bs=1M iflag=fullblock conv=sparse,fsync"
            f" && rm /run/image.gz && mkdir -p {directory} && mount {volume} {directory}",
            timeout_s=120,
        )
        yield directory
    finally:
        guest.run(f"umount {directory}; lvremove -q -y {volume}", timeout_s=120)


@contextmanager
def restored(shop: Shop, generation: str, scratch: Path) -> "Iterator[Copy]":
    """Yield a database that runs on what was restored from a generation; see `restored_volume`."""
    with restored_volume(shop.group, generation, scratch, VOLUME_SIZE) as directory:
        copy = GuestMariaDB(
            shop.guest, f"{directory}/data", *_COPY, *_SERVER, guest_port=3307, socket="/run/mysqld/copy.sock"
        )
        with copy as database:
            yield Copy(shop, database)


class Copy:
    """A database that came to life again from a backup of `shop`."""

    def __init__(self, shop: Shop, database: GuestMariaDB) -> None:
        self._shop = shop
        self.database = database

    def assert_sound(self) -> None:
        """Every table is well, by the server's own word, and nothing had to be repaired."""
        tables = self.database.run(
            "SELECT CONCAT(table_schema, '.', table_name) AS name FROM information_schema.tables WHERE"
            " table_type = 'BASE TABLE' AND table_schema NOT IN ('information_schema', 'performance_schema')"
        )
        names = [str(row["name"]) for row in tables]
        assert {f"shop.{table}" for table in TABLES} < set(names)
        rows = self.database.run(f"CHECK TABLE {', '.join(names)} EXTENDED")
        assert [row["Table"] for row in rows] == names, [row for row in rows if row["Msg_text"] != "OK"]
        assert {row["Msg_text"] for row in rows} == {"OK"}, [row for row in rows if row["Msg_text"] != "OK"]
        log = self.database.log()
        assert not re.search(r"\[ERROR\]|crashed", log), log

    def assert_of_one_moment(self) -> None:
        """No session's rows have a gap, and no table is ahead of another by more than the row on its way."""
        total = 0
        for session in range(1, SESSIONS + 1):
            ends = []
            for engine in writers.ENGINES:
                select = f"SELECT COUNT(*) AS rows_, MAX(n) AS last FROM shop.{engine} WHERE session = {session}"
                (row,) = self.database.run(select)
                assert row["rows_"] == row["last"]
                ends.append(int(str(row["last"])))
            assert ends == sorted(ends, reverse=True) and ends[0] - ends[-1] <= 1
            total += ends[-1]
        for engine in writers.ENGINES:
            (row,) = self.database.run(f"SELECT n FROM shop.{engine}_counter")
            assert total - SESSIONS <= int(str(row["n"])) <= total
        (row,) = self.database.run("SELECT SUM(balance) AS sum FROM shop.account")
        assert row["sum"] == 0

    def assert_exactly(self, coordinates: "Mapping[str, object]") -> None:
        """The tables hold what the original's binary log says up to these coordinates, no row more or less."""
        file, position = str(coordinates["binlog_file"]), int(str(coordinates["binlog_position"]))
        directory = shlex.quote(self._shop.database.data)
        files = self._shop.guest.output(f"cd {directory} && ls binlog.[0-9]*").split()
        read = f"mariadb-binlog --no-defaults --base64-output=decode-rows -v --stop-position={position}"
        files = files[: files.index(file) + 1]
        log = self._shop.guest.output(f"cd {directory} && {read} {' '.join(files)}", timeout_s=120)
        expected = binlog.replayed(log, _rows_at_first())
        for table in TABLES:
            rows = self.database.run(f"SELECT * FROM shop.{table}")
            assert Counter(tuple(map(str, row.values())) for row in rows) == expected[table], table

    def replicate(self, statement: str) -> None:
        """Become a replica of the original by the statement of `--replica-statement`, as it was printed."""
        login = "MASTER_USER='replica', MASTER_PASSWORD='replica'"
        self.database.run(
            f"CHANGE MASTER TO MASTER_HOST='127.0.0.1', MASTER_PORT=3306, MASTER_CONNECT_RETRY=1, {login}"
        )
        self.database.client(statement)
        self.database.run("START SLAVE")

    def wait_until_caught_up(self) -> None:
        """Wait until the replica is where the original stands now; it must come there without an error."""
        (row,) = self._shop.database.run("SELECT @@GLOBAL.gtid_binlog_pos AS gtid")
        wait = f"SELECT MASTER_GTID_WAIT('{row['gtid']}', 1) AS failed"
        deadline = time.monotonic() + _DEADLINE_S
        while self.database.run(wait)[0]["failed"] != 0:
            (status,) = self.database.run("SHOW SLAVE STATUS")
            assert status["Last_SQL_Error"] == "", status  # a connection that failed is tried again
            assert time.monotonic() < deadline, status

    def assert_caught_up(self) -> None:
        """The replica holds the same as the original, which nobody writes to any more."""
        self.wait_until_caught_up()
        assert checksums(self.database) == checksums(self._shop.database)


def checksums(server: Server) -> "dict[str, object]":
    """Return the checksum of each table by its name; none of them may be empty."""
    found = server.run(f"CHECKSUM TABLE {', '.join(f'shop.{table}' for table in TABLES)}")
    shown = {str(row["Table"]): row["Checksum"] for row in found}
    assert all(shown.values()), shown
    return shown


def field(summary: "Mapping[str, object]", name: str) -> "dict[str, object]":
    """Return a field of a summary that is an object."""
    found = summary[name]
    assert isinstance(found, dict)
    return cast("dict[str, object]", found)
