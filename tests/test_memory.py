"""Memory does not grow with the image: agent below 64 MiB and server below 200 MiB, whatever is backed up."""

import filecmp
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import commands, processes
from tests.conftest import require
from tests.sshd import Sshd

AGENT_LIMIT = 64 << 20
SERVER_LIMIT = 200 << 20
SPARSE_BYTES = 64 << 30
DENSE_BYTES = 2 << 30


class Peaks:
    """Runs commands and keeps the most memory that any of them, and any agent, has held, in bytes."""

    def __init__(self, sshd_mark: str | None = None) -> None:
        self.server = 0
        self.agent = 0
        self._sshd_mark = sshd_mark

    def run(self, *words: str | Path) -> None:
        """Run `blockdiff` with these words, which must succeed, and measure it."""
        mark = processes.new_mark()
        process = subprocess.Popen(
            [sys.executable, commands.BIN / "blockdiff", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **processes.environment(mark)},
        )
        agents: set[int] = set()
        while process.poll() is None:
            self.server = max(self.server, processes.peak_rss(process.pid))
            if words[0] == "backup" and not agents:
                agents = {pid for pid, line in self._marked(mark).items() if _is_agent(line)}
            self.agent = max([self.agent, *map(processes.peak_rss, agents)])
            time.sleep(0.002)
        assert process.returncode == 0

    def _marked(self, mark: str) -> dict[int, str]:
        return processes.marked(self._sshd_mark or mark)

    def assert_modest(self) -> None:
        print(f"agent {self.agent / (1 << 20):.0f} MiB, server {self.server / (1 << 20):.0f} MiB")
        assert 8 << 20 < self.agent < AGENT_LIMIT  # the lower bounds: it was measured at all
        assert 8 << 20 < self.server < SERVER_LIMIT


def _is_agent(line: str) -> bool:
    """Return whether a command line is the agent's own, not that of the shell that looks for a Python."""
    return "blockdiff-agent" in line and not line.startswith(("/bin/sh", "sh ", "bash"))


def test_a_64_gigabyte_sparse_image(large_tmp_path: Path) -> None:
    image, chain = large_tmp_path / "image", large_tmp_path / "backup" / "disk"
    chain.parent.mkdir()
    with image.open("wb") as file:
        for place in range(0, SPARSE_BYTES, SPARSE_BYTES // 64):
            file.seek(place)
            file.write(os.urandom(1 << 20))
        file.truncate(SPARSE_BYTES + 1)
    peaks = Peaks()
    peaks.run("backup", chain, image)
    with image.open("r+b") as file:
        for place in range(SPARSE_BYTES // 128, SPARSE_BYTES, SPARSE_BYTES // 16):
            file.seek(place)
            file.write(os.urandom(1 << 20))
    peaks.run("backup", chain, image)
    peaks.run("verify", chain)
    peaks.run("restore", chain, large_tmp_path / "restored")
    peaks.assert_modest()
    restored = large_tmp_path / "restored"
    assert restored.stat().st_size == SPARSE_BYTES + 1
    assert restored.stat().st_blocks <= image.stat().st_blocks * 1.1
    with image.open("rb") as expected, restored.open("rb") as found:
        for place in range(0, SPARSE_BYTES, SPARSE_BYTES // 128):
            expected.seek(place)
            found.seek(place)
            assert expected.read(2 << 20) == found.read(2 << 20), place


@pytest.mark.parametrize("transport", ["local", "ssh", "paramiko"])
def test_a_2_gigabyte_dense_image(
    large_tmp_path: Path, tmp_path: Path, transport: str, request: pytest.FixtureRequest
) -> None:
    image, chain = large_tmp_path / "image", large_tmp_path / "backup" / "disk"
    chain.parent.mkdir()
    chunk = bytearray(os.urandom(64 << 20))
    with image.open("wb") as file:
        for place in range(0, DENSE_BYTES, len(chunk)):
            chunk[:8] = place.to_bytes(8, "little")
            file.write(chunk)
    words: list[str | Path] = ["--compression", "zstd", "--level", "1"]
    source, mark = str(image), None
    if transport != "local":
        sshd: Sshd = request.getfixturevalue("sshd")
        source, mark = sshd.url(image), sshd.mark
        words += ["--transport", transport, *sshd.arguments]
    peaks = Peaks(mark)
    peaks.run("backup", chain, source, *words)
    with image.open("r+b") as file:
        for place in range(0, DENSE_BYTES, 1 << 20):
            file.seek(place)
            file.write(os.urandom(64))
    peaks.run("backup", chain, source, *words)
    if transport == "local":  # the others have the same files
        peaks.run("verify", chain)
        peaks.run("restore", chain, large_tmp_path / "restored")
        assert filecmp.cmp(image, large_tmp_path / "restored", shallow=False)
    peaks.assert_modest()


def test_the_measure_sees_what_a_process_holds(tmp_path: Path) -> None:
    require(Path("/proc/self/status").exists(), "/proc")
    code = "held = bytearray(100 << 20); held[:] = b'x' * len(held); del held; print('ready', flush=True); input()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        assert processes.peak_rss(process.pid) > 100 << 20
        process.communicate(b"\n")
    assert processes.peak_rss(process.pid) == 0
