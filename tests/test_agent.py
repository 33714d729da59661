"""What the agent does beside dumping: leases, limits, priorities, disks that fail, and what it must never touch."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff.host import restraint
from blockdiff.shared import wire
from blockdiff.shared.errors import SourceError
from blockdiff.transport.advice import Place
from blockdiff.transport.child import ChildConnection
from tests import agents, loop
from tests.conftest import require_program, require_strace
from tests.descriptors import all_closed

BLOCK = 4096
BATCH = 2 << 20
ROOT = Path(__file__).resolve().parent.parent

#: Runs the agent's code with other deadlines than those that are shipped.
WITH_DEADLINES = """
import os, sys
sys.path.insert(0, sys.argv[1])
from blockdiff.host import agent
from blockdiff.shared import wire
wire.SILENCE_S = float(sys.argv[2])
wire.HEARTBEAT_S = float(sys.argv[3])
agent.ORDER_TIMEOUT_S = float(sys.argv[4])
agent.main(b"go")
"""


def with_deadlines(silence_s: float = 60, heartbeat_s: float = 60, request_s: float = 60) -> ChildConnection:
    """Start an agent with other deadlines, up to its first frame."""
    numbers = [str(number) for number in (silence_s, heartbeat_s, request_s)]
    child = ChildConnection([sys.executable, "-I", "-c", WITH_DEADLINES, str(ROOT), *numbers], Place("host", "host"))
    assert child.readinto(memoryview(bytearray(2)), agents.PROMPTLY_S) == 2
    return child


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"\x5a" * (32 << 20))
    return path


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


@pytest.mark.parametrize("when", ["before the request", "while it sends"])
def test_a_server_that_goes_silent_ends_the_agent(image: Path, when: str) -> None:
    silence_s = 0.3 if when == "before the request" else 3
    with with_deadlines(silence_s=silence_s) as child:
        if when == "while it sends":
            link = wire.Link(child)
            alive = wire.Heartbeat(link, 0.1)
            alive.start()
            link.read_json(link.receive())
            link.send_json(wire.REQUEST, {"paths": [str(image).encode().hex()], "directories": []})
            link.send_json(wire.TAKE, {})
            link.send_json(wire.SCAN, {"block_size": BLOCK, "digest": "sha256", "full": True})
            for kind in (wire.READY, wire.TAKEN, wire.SOURCE):
                frame = link.receive()
                assert frame.kind == kind
                link.read_json(frame)
            alive.stop()
        assert child.wait(agents.PROMPTLY_S) == (1,)
        assert child.stderr() == f"blockdiff agent: silent for {silence_s:g} s\n"


def test_a_server_that_is_alive_holds_the_agent() -> None:
    """It has nothing to say for several times the silence that ends it, but that it is there."""
    with with_deadlines(silence_s=3) as child:
        link = wire.Link(child)
        link.read_json(link.receive())
        end = time.monotonic() + 8
        while time.monotonic() < end:
            link.send_alive()
            assert child.wait(0.05) is None


def test_a_server_that_never_asks_for_anything_ends_the_agent() -> None:
    with with_deadlines(request_s=0.1) as child:
        link = wire.Link(child, agents.PROMPTLY_S)
        link.read_json(link.receive())
        frame = link.receive()
        assert frame.kind == wire.ERROR
        assert link.read_json(frame)["message"] == "nothing from the server for 0.1 s"
        assert child.wait(agents.PROMPTLY_S) == (1,)


def test_a_signal_that_does_not_wake_the_main_thread_ends_the_agent_all_the_same() -> None:
    """As one that comes just before a wait begins: here another thread takes it, and the main thread sleeps on."""
    with with_deadlines() as child:
        wire.Link(child).receive()  # HELLO: all threads are there
        assert isinstance(child, ChildConnection)
        pid = child._child.pid
        others = [int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid]
        assert ctypes.CDLL(None).tgkill(pid, others[-1], signal.SIGTERM) == 0
        assert child.wait(agents.PROMPTLY_S) == (1,)
        assert child.stderr() == "blockdiff agent: stopped by SIGTERM\n"


def test_the_agent_says_that_it_is_alive() -> None:
    with with_deadlines(heartbeat_s=0.01) as child:
        kinds: list[int] = []
        while kinds.count(wire.ALIVE) < 3 or wire.HELLO not in kinds:
            kind, length, sequence, offset = next_header(child)
            assert (sequence, offset) == (len(kinds), 0)
            assert kind == wire.HELLO or (kind, length) == (wire.ALIVE, 0)
            kinds.append(kind)
        assert kinds.count(wire.HELLO) == 1


def next_header(child: wire.Carrier) -> tuple[int, int, int, int]:
    """Read the next frame, ALIVE or not, and return its header, but for the checksum."""

    def read(count: int) -> bytearray:
        data, filled = bytearray(count), 0
        while filled < count:
            filled += child.readinto(memoryview(data)[filled:], agents.PROMPTLY_S)
        return data

    kind, length, sequence, offset, _crc = wire.HEADER.unpack(read(wire.HEADER.size))
    read(length)
    return kind, length, sequence, offset


def test_the_bandwidth_is_limited(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x5a" * 30_000 + bytes(5_000_000))
    with agents.conversation() as talk:
        started = time.monotonic()
        talk.request(tmp_path / "image", bandwidth=100_000)
        outcome = talk.receive()
        assert sum(length for _, length, data in outcome.runs if data is not None) < 33_000
        assert 0.3 <= time.monotonic() - started < 30  # 50 s with them: zeros take no time: they are not sent


def test_the_limit_is_kept_on_average(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", lambda s: clock.__setitem__(0, clock[0] + s))
    throttle = restraint.Throttle(1000)
    for _ in range(10):
        throttle.spend(500)
    assert clock[0] == pytest.approx(105)
    clock[0] += 50  # what was not used is not saved up
    throttle.spend(1000)
    assert clock[0] == pytest.approx(156)
    restraint.Throttle(None).spend(1 << 60)
    assert clock[0] == pytest.approx(156)


@pytest.mark.parametrize("low", [True, False])
def test_the_agent_yields_to_everybody_else_where_it_is_told_to(image: Path, low: bool) -> None:
    ionice = require_program("ionice")
    with agents.conversation() as talk:
        talk.request(image, low_priority=low)
        talk.expect(wire.SOURCE)
        pid = talk.child._child.pid
        before = os.nice(0)
        assert os.getpriority(os.PRIO_PROCESS, pid) == (min(before + 10, 19) if low else before)
        shown = subprocess.run([ionice, "-p", str(pid)], capture_output=True, text=True, timeout=60, check=True)
        assert (shown.stdout == "best-effort: prio 7\n") is low


def test_a_host_without_ionice_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"content")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert agents.dump(tmp_path / "image", low_priority=True).applied_to() == b"content"


def test_a_block_device(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    content = b"\x5a" * (3 << 20) + bytes(1 << 20) + b"\xa5" * 512
    backing.write_bytes(content)
    with loop.device(backing) as device:
        outcome = agents.dump(device)
    assert outcome.source == {"kind": "device", "size": len(content)}
    assert outcome.applied_to() == content
    assert (outcome.totals["touched"], outcome.totals["how"]) == (False, "")
    assert [(offset, length) for offset, length, data in outcome.runs if data is None] == [(3 << 20, 1 << 20)]


def traced(*options: str) -> list[str]:
    """Return what runs the agent under strace; skips the test where that is not possible."""
    return [require_strace(), "-f", *options, *agents.command()]


def test_a_read_error_of_the_disk_names_the_offset(image: Path) -> None:
    """Each thread's second read fails, as if the disk did."""
    command = traced("-qq", "-o", "/dev/null", "-e", "inject=preadv,preadv2:error=EIO:when=2+")
    with agents.conversation(command) as talk:
        talk.request(image)
        error = talk.failure()
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
    assert type(error) is SourceError
    found = re.fullmatch(f"host: cannot read {image} at offset ([0-9]+): Input/output error", error.message)
    assert found is not None, error.message
    assert int(found[1]) % BATCH == 0
    assert error.hint == "the disk may be failing, or the snapshot may have overflowed: see the host's kernel log"


def test_the_agent_writes_nothing_to_the_host(image: Path, tmp_path: Path) -> None:
    agents.dump(image)  # Python itself may compile what it has never imported before
    log = tmp_path / "log"
    calls = "trace=open,openat,creat,mkdir,mkdirat,link,linkat,symlink,rename,renameat2,unlink,unlinkat,truncate,mknod"
    assert agents.dump(image, traced("-qq", "-o", str(log), "-e", calls), low_priority=True).totals
    written = [
        line
        for line in log.read_text().splitlines()
        if re.search(r"O_WRONLY|O_RDWR|O_CREAT|creat\(|mkdir|link|rename|truncate|mknod", line)
        and "O_RDONLY" not in line
    ]
    assert written
    assert all('"/dev/null", O_RDWR' in line for line in written), written


def test_a_failure_that_nobody_thought_of_arrives_as_a_sentence() -> None:
    """A path that holds a NUL is no path: the server never sends one."""
    with agents.conversation() as talk:
        talk.request(b"/a\0b")
        error = talk.failure()
        assert error.message.startswith("host: the agent failed: ValueError: ")
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
        said = talk.child.stderr()
        assert "<blockdiff.host.agent>" in said  # the traceback shows the shipped source
        assert "os.open(path" in said
