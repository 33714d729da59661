"""PostgreSQL on one volume, backed up without a lock while it is written to: each generation recovers by itself."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen

import pytest

from tests import commands
from tests.lab import restored
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

BIN = "/usr/lib/postgresql/15/bin"
#: Runs what follows as the user that the server demands to run as.
AS_POSTGRES = "setpriv --reuid=postgres --regid=postgres --clear-groups"
VOLUME_SIZE = "96M"
GENERATIONS = 3
COMMITTED = "/run/committed"
TIMEOUT_S = 500

# small, so that a few seconds see checkpoints and segments used again
_OPTIONS = (
    "-c listen_addresses= -c shared_buffers=2MB -c max_wal_size=4MB -c min_wal_size=2MB -c checkpoint_timeout=30"
    " -c log_checkpoints=on -c logging_collector=off"
)
_SCHEMA = (
    "CREATE TABLE entry (n INT PRIMARY KEY, padding TEXT); CREATE TABLE counter (n INT); INSERT INTO counter VALUES (0)"
)
# psql says the number of each transaction once its COMMIT has returned; it leaves the processor some of its time
_WRITER = rf"""
number=0
exec 3<> <(:)
while ! read -r -t 0.05 -u 3; do
    number=$((number + 1))
    echo "BEGIN; INSERT INTO entry VALUES ($number, repeat(md5('$number'), 30));"
    echo "UPDATE counter SET n = $number; COMMIT;"
    echo "\\echo $number"
done | stdbuf -oL {AS_POSTGRES} {BIN}/psql -qX -v ON_ERROR_STOP=1 -h {{place}} shop >{COMMITTED}
"""


class Postgres:
    """A server in the guest on the volume that is mounted at `directory`."""

    def __init__(self, guest: Guest, directory: str) -> None:
        self.guest = guest
        self.directory = directory
        self.data = f"{directory}/data"

    def tool(self, words: str, *, check: bool = True) -> str:
        """Run one of its programs as its user, by its own socket; return what that printed."""
        command = f"cd / && {AS_POSTGRES} env PGHOST={self.directory} {BIN}/{words}"
        return self.guest.run(command, timeout_s=TIMEOUT_S, check=check).stdout.rstrip("\n")

    def sql(self, statement: str) -> str:
        """Execute a statement; return the rows, fields apart by ``|``."""
        return self.tool(f'psql -qXAt -v ON_ERROR_STOP=1 -c "{statement}" shop')

    def make(self) -> None:
        """Make an empty cluster whose pages carry checksums."""
        self.guest.run(f"chown postgres: {self.directory}")
        self.tool(f"initdb -k -N -E UTF8 --no-locale --wal-segsize=1 -D {self.data}")

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the server; it is killed, not stopped, where the `with` statement ends before `stop`."""
        options = f"{_OPTIONS} -c unix_socket_directories={self.directory}"
        server = f"exec {AS_POSTGRES} {BIN}/postgres -D {self.data} {options}"
        with self.guest.started(f"{server} >{self._log} 2>&1"):
            ready = f"{BIN}/pg_isready -q -h {self.directory}"
            self.guest.run(f"until {ready}; do sleep 0.2; done", timeout_s=TIMEOUT_S)
            yield

    def stop(self) -> None:
        """Stop the server in good order: everything is in its data files then."""
        self.tool(f"pg_ctl stop -w -t {TIMEOUT_S} -m fast -D {self.data}")

    def log(self) -> str:
        """Return what the server has said since it was started."""
        return self.guest.output(f"cat {self._log}")

    @property
    def _log(self) -> str:
        return f"/run/postgres-{self.directory.rsplit('/', 1)[1]}.log"

    @contextmanager
    def written_to(self) -> "Iterator[Popen[str]]":
        """Commit one transaction after the other meanwhile."""
        self.guest.run(f"rm -f {COMMITTED}")
        with self.guest.started(_WRITER.format(place=self.directory)) as writer:
            self.wait_for_commit(1)
            yield writer

    def wait_for_commit(self, number: int) -> None:
        """Wait until that many transactions have been acknowledged."""
        reached = f'[ "$(tail -n 1 {COMMITTED})" -ge {number} ]'
        self.guest.run(f"until {reached}; do sleep 0.2; done 2>/dev/null", timeout_s=TIMEOUT_S)

    def committed(self) -> int:
        """Return the number of the transaction that was acknowledged last."""
        return int(self.guest.output(f"tail -n 1 {COMMITTED}"))


@pytest.mark.timeout(2400)
def test_each_generation_recovers_and_holds_what_was_committed_before_the_snapshot(
    guest: Guest, volume_group: VolumeGroup, tmp_path: Path, large_tmp_path: Path
) -> None:
    volume = volume_group.volume("data", VOLUME_SIZE)
    source = Postgres(guest, volume_group.mounted(volume))
    source.make()
    chain = tmp_path / "postgres"
    bounds = []
    with source.running():
        source.tool("createdb shop")
        source.sql(_SCHEMA)
        with source.written_to():
            for _generation in range(GENERATIONS):
                source.wait_for_commit(source.committed() + 20)
                bounds.append(_backed_up(source, chain, volume))
                assert set(volume_group.volumes()) == {"data"}
        assert "checkpoint complete: wrote" in source.log()
    guest.run(f"umount {source.directory}")
    for number, (first, last) in enumerate(bounds, 1):
        path = restored.onto_volume(
            volume_group,
            f"day{number}",
            VOLUME_SIZE,
            f"{chain}@{number}",
            large_tmp_path,
        )
        _assert_recovers(guest, path, first, last)


def _backed_up(source: Postgres, chain: Path, volume: str) -> tuple[int, int]:
    """Add a generation; return the numbers of what was committed when its snapshot was about to be made, and after."""
    source.guest.run("rm -f /run/before /run/after")
    witnesses = [word for when in ("before", "after") for word in (f"--{when}", f"tail -n 1 {COMMITTED} >/run/{when}")]
    words = (source.guest.url(volume), "--lvm", "--snapshot-size", "100%", *witnesses)
    # at its usual low priority the agent would wait for the writer: the guest has little processor to share
    env = {"SSH_BLOCKDIFF_PREFIX": ""}
    result = commands.run(
        "blockdiff",
        "backup",
        chain,
        *words,
        *source.guest.arguments,
        env=env,
        timeout_s=TIMEOUT_S,
    )
    assert (result.returncode, result.stderr) == (0, b""), result
    first, last = source.guest.output("cat /run/before /run/after").split()
    return int(first), int(last)


def _assert_recovers(guest: Guest, path: str, first: int, last: int) -> None:
    """A server on the restored volume recovers, finds nothing wrong, and ends with a transaction in that range."""
    copy = Postgres(guest, f"/mnt/{path.rsplit('/', 1)[1]}")
    guest.run(f"mkdir -p {copy.directory} && mount {path} {copy.directory} && rm -f {copy.data}/postmaster.pid")
    with copy.running():
        log = copy.log()
        assert "automatic recovery in progress" in log and "redo done at" in log, log
        counts = copy.sql("SELECT min(n), count(*), max(n), (SELECT n FROM counter) FROM entry")
        lowest, rows, highest, counter = map(int, counts.split("|"))
        assert (lowest, rows, counter) == (1, highest, highest)
        assert first <= highest <= last + 1  # one was on its way
        copy.tool("pg_amcheck --install-missing --heapallindexed --parent-check --jobs=2 shop")
        copy.tool("pg_dump shop >/dev/null")
        assert "PANIC" not in copy.log(), copy.log()
        copy.stop()
    assert "Bad checksums:  0" in copy.tool(f"pg_checksums --check -D {copy.data}")
    guest.run(f"umount {copy.directory} && lvremove -q -y {path}")
