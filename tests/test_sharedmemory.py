"""Memory that an agent on this machine shares with the server: the same data as through a pipe, and no way to harm."""

import errno
import os
import random
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blockdiff import backup, transport
from blockdiff.backup import Options
from blockdiff.host import sharedbuffers
from blockdiff.host.sharedbuffers import MIN_RUN, SharedBuffers
from blockdiff.shared import wire
from blockdiff.shared.errors import ConnectionLost, ProtocolError
from blockdiff.transport import bundle
from blockdiff.transport.address import Address
from blockdiff.transport.sharedmemory import SharedMemory
from tests import agents, chains
from tests.descriptors import all_closed
from tests.fake_agent import BLOCK, FakeConnection, Wire
from tests.interpreters import INTERPRETERS
from tests.mariadb import wait_for

SIZE = 64 * BLOCK
NOISE = random.Random(8)


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    with closing(SharedMemory()) as made:
        assert made.prepare(BLOCK)
        yield made


def read(memory: SharedMemory, place: int, length: int) -> bytes:
    room = bytearray(length)
    memory.read_into(memoryview(room), place)
    return bytes(room)


def test_what_the_agent_puts_into_a_buffer_is_what_the_server_reads_at_its_place(memory: SharedMemory) -> None:
    buffers = SharedBuffers(memory.fd, 10_000)
    first, second = buffers.get(), buffers.get()
    first[:], second[:] = NOISE.randbytes(10_000), NOISE.randbytes(10_000)
    for buffer in (first, second):
        assert read(memory, buffers.lend(buffer) + 7, 9_000) == bytes(buffer[7:9_007])


def test_a_buffer_is_used_again_only_when_the_server_has_taken_everything_out(memory: SharedMemory) -> None:
    buffers = SharedBuffers(memory.fd, BLOCK)
    count = sharedbuffers.memory_size(BLOCK) // BLOCK
    returned: list[int] = []

    def scan() -> None:
        for number in range(count):
            buffer = buffers.get()
            buffers.lend(buffer)
            buffers.lend(buffer)
            buffers.give_back(buffer)
            returned.append(number)

    thread = threading.Thread(target=scan, daemon=True)
    thread.start()
    behind = sharedbuffers._BEHIND
    wait_for(lambda: len(returned) == behind, "a scan that waits")
    buffers.taken_out()
    assert len(returned) == behind  # one of two runs of the first buffer: that is not all of it
    for done in range(behind + 1, count + 1):
        buffers.taken_out()
        wait_for(lambda done=done: len(returned) == done, "a buffer that is free")  # type: ignore[misc]
        buffers.taken_out()
    thread.join(30)
    assert not thread.is_alive()


def test_the_end_of_a_scan_waits_for_the_server(memory: SharedMemory) -> None:
    buffers = SharedBuffers(memory.fd, BLOCK)
    buffers.finish()  # nothing to wait for
    for _ in range(2):
        buffers.lend(buffers.get())
    thread = threading.Thread(target=buffers.finish, daemon=True)
    thread.start()
    buffers.taken_out()
    thread.join(0.05)
    assert thread.is_alive()
    buffers.taken_out()
    thread.join(30)
    assert not thread.is_alive()


def test_a_server_that_takes_nothing_out_is_lost(memory: SharedMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharedbuffers, "STALL_S", 0.1)
    buffers = SharedBuffers(memory.fd, BLOCK)
    buffers.lend(buffers.get())
    with pytest.raises(ConnectionLost, match=r"the server read nothing for 0\.1 s"):
        buffers.finish()


def test_a_descriptor_that_is_something_else_is_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"precious" * 1_000_000)
    with path.open("r+b") as file, pytest.raises(ValueError, match=f"descriptor {file.fileno()} is something else"):
        SharedBuffers(file.fileno(), BLOCK)
    with pytest.raises(OSError):
        SharedBuffers(12345, BLOCK)
    assert path.read_bytes() == b"precious" * 1_000_000


def test_memory_that_is_too_small_is_not_used(memory: SharedMemory) -> None:
    with pytest.raises(ValueError):
        SharedBuffers(memory.fd, 4 << 20)


@pytest.mark.parametrize("place", [-1, 0, 1 << 40, (1 << 64) - 1], ids=["its end", "cut off", "far", "very far"])
def test_a_place_outside_of_the_memory_is_an_error(memory: SharedMemory, place: int) -> None:
    size = os.fstat(memory.fd).st_size
    if place == 0:
        os.ftruncate(memory.fd, 0)  # by the other side
    place = size - 1 if place == -1 else place
    with pytest.raises(ProtocolError) as caught:
        read(memory, place, 2)
    assert caught.value.message == f"points to 2 bytes at {place} of {size} that are shared"


IMAGE = NOISE.randbytes(5 << 20) + bytes(1 << 20) + NOISE.randbytes((2 << 20) + 20_077)


def received_kinds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return what gets the kind of each frame that is received from now on."""
    kinds: list[int] = []
    receive = wire.Link.receive

    def noted(link: wire.Link) -> wire.Frame:
        frame = receive(link)
        kinds.append(frame.kind)
        return frame

    monkeypatch.setattr(wire.Link, "receive", noted)
    return kinds


def test_a_local_backup_sends_nothing_but_words_through_the_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = received_kinds(monkeypatch)
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(IMAGE)
    result = backup.backup(chain.name, Address(None, str(chain.source)), Options(block_size=4096))
    assert wire.DATA not in kinds and wire.LENT in kinds
    assert (result.manifest.bytes_received or 0) > 7 << 20  # what was pointed to counts
    chain.source.write_bytes(b"new" + IMAGE[3:])
    second = backup.backup(chain.name, Address(None, str(chain.source)), Options())
    assert second.manifest.changed_blocks == 1
    assert chain.restored() == b"new" + IMAGE[3:] and chain.restored(1) == IMAGE


@pytest.mark.parametrize("version", INTERPRETERS)
def test_every_python_can_share(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = agents.command(INTERPRETERS[version])
    monkeypatch.setattr(bundle, "local_command", lambda: command)
    kinds = received_kinds(monkeypatch)
    chain = chains.new_chain(tmp_path)
    chain.add(IMAGE, Options(block_size=64 << 10))
    assert wire.LENT in kinds and wire.DATA not in kinds
    assert chain.restored() == IMAGE


def test_an_agent_that_cannot_reach_the_memory_sends_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under sudo, which closes what it does not know."""
    kinds = received_kinds(monkeypatch)
    chain = chains.new_chain(tmp_path)
    closing_all = "import os,sys; os.closerange(3, 1000); os.execv(sys.argv[1], sys.argv[1:])"
    chain.add(IMAGE, Options(block_size=4096, prefix=[sys.executable, "-c", closing_all]))
    assert wire.DATA in kinds
    assert chain.restored() == IMAGE


def test_without_memory_to_share_everything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(name: str) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", none)
    kinds = received_kinds(monkeypatch)
    chain = chains.new_chain(tmp_path)
    chain.add(IMAGE, Options(block_size=4096))
    assert wire.LENT not in kinds and wire.DATA in kinds
    assert chain.restored() == IMAGE


def test_short_runs_go_through_the_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To look after each would cost more than it saves."""
    kinds = received_kinds(monkeypatch)
    chain = chains.new_chain(tmp_path)
    short = MIN_RUN - 1
    chain.add((b"x" * short + bytes(short)) * 3, Options(block_size=short))
    assert wire.DATA in kinds and wire.LENT not in kinds
    chain.assert_sound()


def lent(place: int, length: int, offset: int = 0) -> Callable[[Wire], object]:
    return lambda agent: agent.frame(wire.LENT, struct.pack("<QQ", place, length), offset)


REFUSED: dict[str, tuple[Callable[[Wire], object], str]] = {
    "outside of the memory": (lent(1 << 50, BLOCK), f"points to {BLOCK} bytes at {1 << 50} of "),
    "over its end": (lent((1 << 64) - 1, BLOCK), f"points to {BLOCK} bytes at {(1 << 64) - 1} of "),
    "nothing": (lent(0, 0), f"sent 0 bytes at offset 0 of {SIZE}, after 0"),
    "more than a frame": (lent(0, wire.MAX_PAYLOAD + 1), f"sent {wire.MAX_PAYLOAD + 1} bytes at once"),
    "not whole blocks": (lent(0, BLOCK, 1), f"sent {BLOCK} bytes at offset 1, which are not whole blocks"),
    "beyond the image": (lent(0, BLOCK, SIZE), f"sent {BLOCK} bytes at offset {SIZE} of {SIZE}, after 0"),
    "half a place": (lambda agent: agent.frame(wire.LENT, bytes(8)), "sent a place of 8 bytes"),
    "a long place": (lambda agent: agent.frame(wire.LENT, bytes(17)), "oversized frame of kind LENT: 17 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_agent_that_points_to_what_cannot_be_is_refused(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, words = REFUSED[what]

    def script(agent: Wire) -> None:
        agent.begin()
        agent.source(SIZE)
        step(agent)

    chain = chains.new_chain(tmp_path)
    with closing(SharedMemory()) as memory:

        def connect(*_: object) -> FakeConnection:
            connection = FakeConnection(script)
            connection.memory = memory
            return connection

        monkeypatch.setattr(transport, "connect", connect)
        with pytest.raises(ProtocolError) as caught:
            backup.backup(chain.name, Address("host", "/disk"), Options(block_size=BLOCK))
    assert caught.value.message.startswith(f"the agent on host broke the protocol: {words}")
    assert chain.files() == {}


def test_the_agent_refuses_words_about_memory_that_nobody_shares(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(BLOCK))
    with agents.conversation() as talk:
        talk.link.send(wire.TAKEN_OUT)
        assert talk.failure().message == "host: the server sent an unexpected frame of kind TAKEN_OUT"
