"""What the tests share: how a test says what it needs, and the fixtures that start real programs."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from blockdiff.database.accounts import Account
from tests.mariadb import MariaDB
from tests.sshd import Sshd

for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:  # inherited from nohup or a shell; our commands would respect it
        signal.signal(number, handler)

# A test must not fail because the machine was slow for a moment, or because of a random case: each run draws the same
# cases, and `make explore` draws others.
settings.register_profile(
    "any speed",
    deadline=None,
    derandomize=os.environ.get("BLOCKDIFF_EXPLORE") != "1",
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("any speed")

_SHM = Path("/dev/shm")
#: The directory for large images: a file system in memory, if it is large enough (in containers it often is not). If
#: /dev/shm is only a directory in /dev, it cannot be used: blockdiff refuses to restore there.
LARGE = _SHM if _SHM.is_mount() and shutil.disk_usage(_SHM).free >= 8 << 30 else None

#: Files whose tests take more than about 10 s in all: `make quick` leaves them out.
_SLOW = {
    "agent", "authorize", "backup_command", "chain_files", "cli", "commit", "damage", "database_backup", "freeze",
    "golden", "history", "live_sources", "lvm", "lvm_dump", "memory", "mysqllock", "original", "original_backup",
    "power_cut", "proofs", "recovery", "rekey", "repair", "restore", "restore_devices", "salvage", "shipped", "smoke",
    "ssh", "ssh_errors", "ssh_reasons", "ssh_settings", "streams", "volumes_backup",
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that `make quick` leaves out."""
    for item in items:
        if item.path.parent.name == "lab" or item.path.stem.removeprefix("test_") in _SLOW:
            item.add_marker(pytest.mark.slow)


def require(present: object, what: str) -> None:
    """Skip the test if `what` is not `present`. If BLOCKDIFF_REQUIRE is 1, as in CI, let it fail instead."""
    if present:
        return
    if os.environ.get("BLOCKDIFF_REQUIRE") == "1":
        pytest.fail(f"needs {what}, and BLOCKDIFF_REQUIRE is set")
    pytest.skip(f"needs {what}")


def require_program(name: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name)
    require(path, f"the program {name}")
    assert path is not None
    return path


def require_strace() -> str:
    """Return the path of strace, or skip the test if processes cannot be traced."""
    path = require_program("strace")
    probe = subprocess.run([path, "-o", os.devnull, "true"], capture_output=True, timeout=60, check=False)
    require(probe.returncode == 0, "the right to trace processes")
    return path


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real sshd on loopback to which this user can log in, with a key made for the tests."""
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    with Sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="session")
def mariadb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MariaDB]:
    """A real MariaDB that writes a binary log, with a table of each engine."""
    require(MariaDB.available(), "the programs mariadbd and mariadb-install-db")
    with MariaDB(tmp_path_factory.mktemp("mariadb"), "--log-bin=binlog", "--server-id=1") as server:
        server.make_tables()
        yield server


@pytest.fixture
def backup_account(mariadb: MariaDB) -> Iterator[Account]:
    """An account of that server without any privilege, and with a password that is hard to quote."""
    mariadb.run("""CREATE USER backup@localhost IDENTIFIED BY 'it''s # "hushed" é'""")
    yield Account("backup", 'it\'s # "hushed" é', socket=str(mariadb.socket))
    mariadb.run("DROP USER backup@localhost")


@pytest.fixture
def short_tmp_path() -> Iterator[Path]:
    """A directory, removed after the test. Its path is so short that an LVM tag has room for it and the host's name."""
    with tempfile.TemporaryDirectory() as path:
        yield Path(path).resolve()


@pytest.fixture
def large_tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A directory for large images, in memory if possible; removed after the test."""
    if LARGE is None:
        yield tmp_path
        return
    path = LARGE / f"blockdiff-{os.getpid()}-{tmp_path.name}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path)
