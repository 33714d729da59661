"""Many runs at once, readers beside a writer, and file systems that lack what keeps them apart."""

import errno
import fcntl
import os
import threading
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdiff.shared.errors import EXIT_BUSY, BlockdiffError, StorageError
from tests import chains, commands, conftest, faults
from tests.chains import DAYS, SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.some_days(tmp_path, 1)


@pytest.mark.parametrize("count", [10, pytest.param(50, marks=pytest.mark.torture)])
def test_runs_at_once_make_generations_in_sequence(tmp_path: Path, count: int) -> None:
    """Whoever finds the chain taken says so and exits 4; nobody disturbs another."""
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(DAYS[0])
    statuses = []
    with ExitStack() as stack:
        runs = [
            stack.enter_context(commands.started("blockdiff", "backup", chain.name, chain.source)) for _ in range(count)
        ]
        for run in runs:
            out, err = run.communicate(timeout=250)
            assert out == b"" and (err == b"" or b"another run is busy with" in err), err
            statuses.append(run.returncode)
    assert set(statuses) <= {0, EXIT_BUSY} and 0 in statuses
    assert chain.last() == statuses.count(0)
    chain.images = dict.fromkeys(range(1, chain.last() + 1), DAYS[0])
    chain.assert_sound()


def test_whoever_reads_while_a_run_commits_sees_whole_generations(chain: SmallChain) -> None:
    """Listing, verifying and restoring take no lock: they see a generation as a whole or not at all."""
    done = threading.Event()
    failures: list[BaseException] = []
    looks: list[int] = []

    def read() -> None:
        try:
            while not done.is_set():
                assert chain.bad() == []
                last = chain.last()
                assert chain.restored(last) == DAYS[(last - 1) % 3]
                looks.append(last)
        except (AssertionError, BlockdiffError) as error:
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(1, 12):
            chain.add(DAYS[number % 3])
    finally:
        done.set()
        reader.join(60)
    assert failures == []
    assert looks == sorted(looks) and len(set(looks)) > 1
    chain.assert_sound()


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_hard_links_is_refused(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    before = chain.files()
    with (
        faults.at_step(monkeypatch, 1, number, ("link",)),
        pytest.raises(StorageError, match=r"cannot make a hard link in .*backup: ") as caught,
    ):
        chain.add(DAYS[1])
    assert caught.value.hint is not None and "a file system with hard links" in caught.value.hint
    assert chain.files() == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_refused(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(_fd: int, _operation: int) -> None:
        raise OSError(number, os.strerror(number))

    before = chain.files()
    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(StorageError, match=rf"cannot lock .*disk\.lock: {os.strerror(number)}") as caught:
        chain.add(DAYS[1])
    assert caught.value.hint == "keep backups on a file system with flock(2)"
    assert chain.files() == before
    assert chain.restored(1) == DAYS[0]


def test_a_file_system_without_hard_links_is_refused_before_anything_is_read(chain: SmallChain) -> None:
    """Not after the hours that a source may take: this one does not even exist."""
    strace = [conftest.require_strace(), "-f", "-qq", "-o", "/dev/null"]
    no_links = [*strace, "-e", "trace=linkat", "-e", "inject=linkat:error=EPERM"]
    result = commands.run("blockdiff", "backup", chain.name, chain.source.parent / "no-such-source", under=no_links)
    said = f"cannot make a hard link in {chain.directory}: Operation not permitted"
    assert result.returncode == 1 and said in result.stderr.decode()


def test_a_directory_that_cannot_be_synced_is_refused_before_anything_is_read(chain: SmallChain) -> None:
    strace = [conftest.require_strace(), "-f", "-qq", "-o", "/dev/null"]
    no_sync = [*strace, "-e", "trace=fsync", "-e", "inject=fsync:error=EINVAL"]
    result = commands.run("blockdiff", "backup", chain.name, chain.source.parent / "no-such-source", under=no_sync)
    assert result.returncode == 1 and f"cannot sync {chain.directory}: Invalid argument" in result.stderr.decode()
