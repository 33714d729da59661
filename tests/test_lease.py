"""Sources that another process has a lease on, as a file server has for its client."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff.dump import FileSource
from blockdiff.host import lease
from blockdiff.shared.errors import SourceError
from tests import chains, commands, conftest

#: Takes a lease to write on a file, and lets go of it when it is told that somebody wants the file, or never.
HOLDER = """
import fcntl, os, signal, sys, time
fd = os.open(sys.argv[1], os.O_RDWR)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
try:
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
except OSError as error:
    print(error, flush=True)
else:
    print("leased", flush=True)
while True:
    signal.sigwait([signal.SIGIO])
    print("wanted", flush=True)
    if sys.argv[2] == "lets go":
        time.sleep(0.1)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""


@contextmanager
def leased(path: Path, how: str) -> "Iterator[subprocess.Popen[bytes]]":
    """Let another process have a lease on a file; skip the test where the file system knows none."""
    with subprocess.Popen([sys.executable, "-c", HOLDER, path, how], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            conftest.require(child.stdout.readline() == b"leased\n", "a file system with leases")
            yield child
        finally:
            child.kill()


def test_a_source_with_a_lease_is_waited_for(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(chains.DAYS[0])
    with leased(chain.source, "lets go") as holder:
        commands.done("blockdiff", "backup", chain.name, chain.source)
        assert holder.stdout is not None and holder.stdout.readline() == b"wanted\n"
    assert chain.restored(1) == chains.DAYS[0]


def test_who_does_not_let_go_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "TIMEOUT_S", 0.2)
    path = tmp_path / "image"
    path.write_bytes(b"image")
    with leased(path, "holds on") as holder, pytest.raises(SourceError) as caught:
        name = Path(f"/proc/{holder.pid}/comm").read_text().strip()
        FileSource(os.fsencode(path))
    words = f"cannot open {path}: {name} (process {holder.pid}) has a lease on it and did not release it for 0.2 s"
    assert caught.value.message == words
    assert caught.value.hint == "run again when that program has closed it"
