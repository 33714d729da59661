"""A database that keeps files on other volumes: refused with what would take them, and restored from a run of all."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands
from tests.lab.mariadb import GuestMariaDB
from tests.lab.shop import Shop, restored_volume

pytestmark = pytest.mark.timeout(900)  # a minute on a machine that has nothing else to do

PATIENCE_S = 240.0
SIZE = "96M"
TABLES = ("kept.far_innodb", "kept.far_myisam", "kept.far_aria", "kept.near", "linked.of_linked")


@dataclass(frozen=True)
class Scattered:
    """A database with its directory on the volume `data`, and with files of every kind on the volume `far`."""

    shop: Shop
    database: GuestMariaDB
    data: str
    far: str
    place: str

    def server(self, directory: str) -> GuestMariaDB:
        return _server(self.shop, directory, self.place)

    def backup(self, name: Path, *words: str) -> "subprocess.CompletedProcess[bytes]":
        url = f"mysql+ssh://root@/?socket={self.database.socket}"
        arguments = [self.shop.guest.url(self.data), *self.shop.arguments("--mysql", url, *words)]
        return commands.run("blockdiff", "backup", name, *arguments, timeout_s=PATIENCE_S)


def _server(shop: Shop, directory: str, place: str) -> GuestMariaDB:
    options = (
        *("--server-id=7", f"--log-bin=/mnt/{shop.group.name}-logs/binlog"),
        *("--innodb-undo-tablespaces=2", f"--innodb-undo-directory={place}/undo"),
        *("--innodb-data-home-dir=", f"--innodb-data-file-path=ibdata1:12M;{place}/ibdata2:12M:autoextend"),
    )
    socket = "/run/mysqld/scattered.sock"
    return GuestMariaDB(shop.guest, f"{directory}/data", *options, guest_port=3309, socket=socket)


@pytest.fixture(scope="module")
def scattered(open_shop: Shop) -> Iterator[Scattered]:
    group, guest = open_shop.group, open_shop.guest
    data, far = group.volume("scattered", SIZE), group.volume("far-away", SIZE)
    directory, place = group.mounted(data), group.mounted(far)
    guest.run(
        f"mkdir -p {place}/undo {place}/tables /mnt/{group.name}-logs && chown -R mysql {place} /mnt/{group.name}-logs"
    )
    with _server(open_shop, directory, place) as database:
        database.run("CREATE DATABASE kept", "CREATE DATABASE linked", "CREATE TABLE kept.near (n INT) ENGINE=InnoDB")
        for engine in ("InnoDB", "MyISAM", "Aria"):
            where = f"DATA DIRECTORY='{place}/tables'"
            where += f" INDEX DIRECTORY='{place}/tables'" if engine == "MyISAM" else ""
            database.run(f"CREATE TABLE kept.far_{engine.lower()} (n INT) ENGINE={engine} {where}")
        database.stop()
        guest.run(f"cd {directory}/data && mv linked {place}/linked && ln -s {place}/linked linked")
        database.start()
        database.run(
            "CREATE TABLE linked.of_linked (n INT) ENGINE=InnoDB",
            *(f"INSERT INTO {table} VALUES (1), (2), (3)" for table in TABLES),
        )
        yield Scattered(open_shop, database, data, far, place)


def test_files_on_a_volume_that_is_not_in_the_run_are_refused_with_what_takes_them(
    scattered: Scattered, tmp_path: Path
) -> None:
    shop, place, directory = scattered.shop, scattered.place, scattered.database.data
    before = shop.changes()
    result = scattered.backup(tmp_path / "data")
    said = result.stderr.decode()
    assert (result.returncode, result.stdout) == (1, b""), said
    assert "the database needs files that are not in this run: " in said
    for path in (f"{place}/undo", place, f"{place}/tables/kept", f"{directory}/linked", f"{directory}/kept/far_"):
        assert f"{path}" in said, said
    assert f"--also NAME={scattered.far}" in said
    assert shop.changes() == before
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")] == []


def test_with_the_other_volume_the_restored_server_starts_and_has_all_tables(
    scattered: Scattered, tmp_path: Path, large_tmp_path: Path
) -> None:
    shop, guest, unit = scattered.shop, scattered.shop.guest, scattered.database.unit
    freeze = [word for name in ("STOP", "CONT") for word in (f"systemctl kill -s {name} {unit}",)]
    names = [tmp_path / "data", tmp_path / "far"]
    words = ["--also", f"{names[1]}={scattered.far}", "--before", freeze[0], "--after", freeze[1]]
    result = scattered.backup(names[0], *words)
    assert (result.returncode, result.stderr) == (0, b""), result.stderr
    made = json.loads(result.stdout)[0]
    assert f"the binary logs in /mnt/{shop.group.name}-logs are not in this run" in made["notes"]
    scattered.database.stop()
    with ExitStack() as stack:
        copies = [restored_volume(shop.group, f"{name}@1", large_tmp_path, SIZE) for name in names]
        places = [stack.enter_context(copy) for copy in copies]
        guest.run(f"umount {scattered.place} && mount --bind {places[1]} {scattered.place}")
        stack.callback(guest.run, f"umount {scattered.place} && mount {scattered.far} {scattered.place}")
        database = stack.enter_context(scattered.server(places[0]))
        assert "[ERROR]" not in database.log(), database.log()
        for table in TABLES:
            assert {row["Msg_text"] for row in database.run(f"CHECK TABLE {table} EXTENDED")} == {"OK"}, table
            assert [row["n"] for row in database.run(f"SELECT n FROM {table} ORDER BY n")] == [1, 2, 3]
