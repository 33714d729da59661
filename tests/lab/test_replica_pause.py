"""A replica with MyISAM and Aria tables, backed up while it applies: its copy goes on where its position says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import commands
from tests.lab import shop as shops
from tests.lab.mariadb import GuestMariaDB
from tests.lab.shop import VOLUME_SIZE, Copy, Shop, field, restored, restored_volume

pytestmark = pytest.mark.timeout(1500)  # two minutes on a machine that has nothing else to do

PATIENCE_S = 300.0


@dataclass(frozen=True)
class Replica:
    """A replica of the shop on a volume of its own, which applies what is written to the shop meanwhile."""

    shop: Shop
    copy: Copy
    volume: str

    def backup(self, name: Path, *words: str) -> "tuple[int, dict[str, object], str]":
        url = f"mysql+ssh://root@/?socket={self.copy.database.socket}"
        arguments = [self.shop.guest.url(self.volume), *self.shop.arguments("--mysql", url, *words)]
        result = commands.run("blockdiff", "backup", name, *arguments, timeout_s=PATIENCE_S)
        return result.returncode, json.loads(result.stdout or b"{}"), result.stderr.decode()

    def applies(self) -> object:
        (row,) = self.copy.database.run("SHOW ALL SLAVES STATUS")
        return row["Slave_SQL_Running"]


@pytest.fixture
def replica(open_shop: Shop, tmp_path: Path, large_tmp_path: Path) -> Iterator[Replica]:
    open_shop.backed_up(tmp_path / "source", "--mysql", "ssh")
    with restored(open_shop, f"{tmp_path}/source@1", large_tmp_path) as copy:
        copy.replicate(commands.done("blockdiff", "list", f"{tmp_path}/source@1", "--replica-statement").decode())
        with shops.written_to(open_shop):
            copy.wait_until_caught_up()
            yield Replica(open_shop, copy, open_shop.group.path("copy-source"))


@contextmanager
def brought_to_life(replica: Replica, generation: str, scratch: Path) -> Iterator[Copy]:
    """Yield a third database, which runs on what was restored from the replica's backup; it applies nothing yet."""
    with restored_volume(replica.shop.group, generation, scratch, VOLUME_SIZE) as directory:
        relay_log = f"--relay-log={replica.copy.database.unit}-relay-bin"  # as the replica called it, by its PID file
        options = ("--server-id=3", "--skip-slave-start", "--log-bin=binlog", "--binlog-format=ROW", relay_log)
        server = GuestMariaDB(
            replica.shop.guest, f"{directory}/data", *options, guest_port=3310, socket="/run/mysqld/third.sock"
        )
        with server as database:
            yield Copy(replica.shop, database)


def test_without_the_option_there_are_no_coordinates_and_with_it_the_copy_goes_on(
    replica: Replica, tmp_path: Path, large_tmp_path: Path
) -> None:
    status, made, said = replica.backup(tmp_path / "replica")
    assert (status, made["database"], replica.applies()) == (3, None, "Yes")
    assert "is a replica with tables without transactions" in said and "--replica-pause" in said
    status, made, said = replica.backup(tmp_path / "replica", "--replica-pause")
    assert (status, said, replica.applies()) == (0, "", "Yes")
    assert field(made, "database")["replica_channels"]
    with brought_to_life(replica, f"{tmp_path}/replica@2", large_tmp_path) as third:
        third.database.run("START SLAVE")
        third.wait_until_caught_up()  # error 1062 would end it
    replica.copy.wait_until_caught_up()
