"""Reading, sending, receiving and writing overlap, and each waits for the next: nothing piles up in between."""

import os
import time
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.format.deltawriter import MAX_MEMBER_BYTES
from blockdiff.progress import Progress
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.session import Session
from blockdiff.shared import pipeline
from blockdiff.shared.blocks import digest_named
from blockdiff.transport.address import Address
from tests import chains, processes

#: What may be between the agent and the backup's disk, in bytes: members being compressed, those behind and before
#: them, and what pipes hold.
UNDER_WAY = (pipeline.worker_count() + 4) * MAX_MEMBER_BYTES


class Watcher(Progress):
    """Looks at the delta on the disk whenever the run says how far it is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.behind: list[int] = []

    def update(self, offset: int, received: int) -> None:
        written = [path.stat().st_size for path in self._directory.iterdir() if path.name == ".disk.1.gz.tmp"]
        self.behind.append(offset - sum(written))


def test_the_server_writes_while_the_agent_sends(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    watcher = Watcher(chain.directory)
    # zlib at its slowest: much slower than the agent
    chain.add(os.urandom(3 * UNDER_WAY), backup.Options(compression="gzip", level=9), watcher)
    assert len(watcher.behind) > 1
    assert max(watcher.behind) <= UNDER_WAY


def test_an_agent_whose_server_is_slow_reads_no_further(large_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4 * UNDER_WAY
    image = large_tmp_path / "image"
    image.write_bytes(os.urandom(1 << 20) * (size >> 20))
    mark = processes.new_mark()
    for name, value in processes.environment(mark).items():
        monkeypatch.setenv(name, value)
    with Session(Address(None, str(image))) as session:
        session.prepare(RunRequest([SourceRequest(os.fsencode(image))]))
        session.begin_take()
        session.end_take()
        scan = ScanRequest(64 << 10, digest_named("sha256"))
        assert session.scan(scan).size == size
        runs = session.changes(scan, size, lambda length: memoryview(bytearray(length)))
        next(runs)
        (agent,) = processes.marked(mark)
        assert _settled(agent) <= UNDER_WAY
        assert sum(run.length for run in runs) + (2 << 20) >= size
        assert session.totals.read == size
    processes.wait_until_gone(mark)


def _settled(pid: int) -> int:
    """Return how many bytes a process has read, once it has stopped reading for a while."""
    last, since = -1, time.monotonic()
    while time.monotonic() - since < 0.5:
        found = int(Path("/proc", str(pid), "io").read_text().split()[1])
        if found != last:
            last, since = found, time.monotonic()
        time.sleep(0.02)
    return last
