"""Every system call that a run makes on its files fails once, or is the last one: with strace, in real processes."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from blockdiff.chain.commit import LockedChain
from tests import chains, commands
from tests.chains import DAYS, SmallChain
from tests.conftest import require_strace

pytestmark = pytest.mark.torture

#: What happens in place of a call.
FAULTS = ("error=EIO", "error=ENOSPC", "signal=KILL")
#: The calls that change something, or tell whether a change was accepted.
CALLS = ("openat", "write", "fsync", "linkat", "renameat", "unlinkat", "close")


@dataclass(frozen=True)
class Ended:
    """How a run ended, and whether a fault was put into it."""

    status: int
    said: str
    faulty: bool


class Strace:
    """Runs the command `blockdiff` with a fault in it. `log` is a file of ours."""

    def __init__(self, log: Path) -> None:
        self._program = require_strace()
        self._log = log

    def run(self, fault: str, call: str, number: int, paths: Sequence[Path], *words: str | Path) -> Ended:
        """Let `call` number `number` (from 1) of those on the files `paths` fail; without `paths`, of all."""
        traced = [word for path in paths for word in ("-P", path)]
        done = subprocess.run(
            [
                *(self._program, "-f", "-qq", "-o", self._log, *traced),
                *(() if "signal" in fault else ("--seccomp-bpf",)),  # quicker, but it loses signals
                *("-e", f"trace={call}", "-e", f"inject={call}:{fault}:when={number}"),
                *(sys.executable, commands.BIN / "blockdiff", *words),
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
            check=False,
        )
        faulty = done.returncode == -signal.SIGKILL or "INJECTED" in self._log.read_text()
        return Ended(done.returncode, done.stderr.decode(), faulty)


@pytest.fixture
def strace(tmp_path: Path) -> Strace:
    return Strace(tmp_path / "strace.log")


@pytest.fixture
def chain(large_tmp_path: Path) -> SmallChain:
    chain = chains.some_days(large_tmp_path, 1)
    chain.source.write_bytes(DAYS[1])
    return chain


def watched(chain: SmallChain) -> list[Path]:
    """Return the paths of all that a run may write to."""
    temporary = [f".{chain.base}.{name}.tmp" for name in ("2.gz", "2.sha256", "2.json", "ver")]
    return [chain.directory, *(chain.directory / name for name in temporary)]


def assert_told(ended: Ended, fault: str) -> None:
    """A run that failed says so in words that a user understands."""
    assert "Traceback" not in ended.said and "Exception" not in ended.said, ended.said
    if fault == "signal=KILL":
        assert ended.status == -signal.SIGKILL or ended.status == 0
    elif ended.status != 0:
        assert ended.status in (1, 3, 5)
        reason = "Input/output error" if fault == "error=EIO" else "No space left on device"
        assert re.match(f"blockdiff: .*: {reason}\n", ended.said), ended.said


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
def test_a_backup_in_which_a_call_fails(chain: SmallChain, strace: Strace, call: str, fault: str) -> None:
    """What was there restores at once, what was told as done is there, and the next run goes on."""
    for number in count(1):
        copy = chain.copy_to(chain.directory.parent / "copy")
        ended = strace.run(fault, call, number, watched(copy), "backup", copy.name, chain.source)
        assert_told(ended, fault)
        assert ended.faulty or ended.status == 0
        assert copy.restored(1) == DAYS[0]
        if ended.status == 0:
            assert copy.file(".ver").read_bytes() == b"2\n"
            assert copy.restored(2) == DAYS[1]
        with LockedChain(copy.name) as opened:
            last = opened.last()
        assert last == 2 or (last == 1 and ended.status != 0)
        copy.images[2] = DAYS[1]
        copy.assert_sound()
        shutil.rmtree(copy.directory)
        if not ended.faulty:
            break
    assert number > 1, "no such call is made"


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", ["pwrite64", "ftruncate", "fsync", "link", "rename", "unlink"])
@pytest.mark.parametrize("force", [False, True])
def test_a_restore_in_which_a_call_fails(chain: SmallChain, strace: Strace, call: str, fault: str, force: bool) -> None:
    """The file is there as a whole or not at all; one that was there before stays."""
    if call == ("link" if force else "rename"):
        return
    path = chain.directory.parent / "image"
    before = b"before" if force else None
    for number in count(1):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        words = ["restore", "--force"] if force else ["restore"]
        ended = strace.run(fault, call, number, [], *words, chain.name, path)
        assert_told(ended, fault)
        found = path.read_bytes() if path.exists() else None
        assert found == DAYS[0] or (ended.status != 0 and found == before)
        if not ended.faulty:
            break
    assert number > 1 or call == "unlink", "no such call is made"
