"""Frames: what is sent arrives, and whatever is not as it was sent is noticed before it is used."""

import json
import math
import os
import select
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff.shared import wire
from blockdiff.shared.errors import ConnectionLost, ProtocolError
from blockdiff.shared.wire import Link

Sent = tuple[int, bytes, int]
KINDS = range(wire.ERROR, wire.SNAPSHOTS + 1)  # ALIVE is never handed on
FRAMES: list[Sent] = [
    (wire.HELLO, b'{"protocol": 1}', 0),
    (wire.DATA, b"some bytes", 1 << 40),
    (wire.PROGRESS, b"", 65536),
    (wire.END, b"{}", 0),
]


class Memory(wire.Carrier):
    """A stream from memory that ends where the bytes do; what is written is kept in `written`."""

    def __init__(self, incoming: bytes = b"", step: int = 1 << 30) -> None:
        self._incoming = incoming
        self._step = step
        self.written = b""
        self.waited: list[float] = []

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        count = min(len(view), len(self._incoming), self._step)
        view[:count] = self._incoming[:count]
        self._incoming = self._incoming[count:]
        self.waited.append(timeout_s)
        return count

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        self.written += b"".join(parts)


def encoded(frames: Sequence[Sent]) -> bytes:
    stream = Memory()
    link = Link(stream)
    for kind, payload, offset in frames:
        link.send(kind, payload, offset=offset)
    return stream.written


def received(data: bytes, step: int = 1 << 30) -> Iterator[Sent]:
    """Yield the frames in `data`; ends with what the link raises at their end."""
    link = Link(Memory(data, step))
    while True:
        frame = link.receive()
        yield frame.kind, link.read_bytes(frame, wire.MAX_PAYLOAD), frame.offset


def refused(data: bytes) -> str:
    """Return why the receiver refuses `data`, which holds no further frame."""
    with pytest.raises(ProtocolError) as caught:
        list(received(data))
    return caught.value.message


def header(kind: int, length: int, sequence: int = 0, offset: int = 0) -> bytes:
    fields = struct.pack("<B3xIIQ", kind, length, sequence, offset)
    return fields + struct.pack("<I", zlib.crc32(fields))


def control(payload: bytes) -> dict[str, object]:
    link = Link(Memory(encoded([(wire.HELLO, payload, 0)])))
    return link.read_json(link.receive())


@contextmanager
def linked() -> Iterator[tuple[Link, Link, list[int]]]:
    """Yield two links that are connected by pipes, and the descriptors of these."""
    down, up = os.pipe(), os.pipe()
    descriptors = [*down, *up]
    try:
        yield Link(wire.Pipe(down[0], up[1])), Link(wire.Pipe(up[0], down[1])), descriptors
    finally:
        for fd in descriptors:
            os.close(fd)


@given(
    st.lists(st.tuples(st.sampled_from(KINDS), st.binary(max_size=200), st.integers(0, (1 << 64) - 1)), max_size=8),
    st.integers(1, 300),
)
def test_frames_arrive_as_they_were_sent(frames: list[Sent], step: int) -> None:
    arrived = []
    with pytest.raises(ConnectionLost, match="the connection ended"):
        for frame in received(encoded(frames), step):
            arrived.append(frame)
    assert arrived == frames


def test_each_kind_has_the_number_that_protocol_3_gives_it() -> None:
    names = (
        "ALIVE ERROR HELLO REQUEST READY TAKE TAKEN SCAN SOURCE TABLE DATA ZERO PROGRESS WANT TOTALS END "
        "OPEN BYTES CLOSE LENT TAKEN_OUT SNAPSHOTS"
    )
    assert wire.PROTOCOL == 3
    assert [getattr(wire, name) for name in names.split()] == list(range(1, 23))


def test_small_frames_are_read_together_and_large_payloads_at_once() -> None:
    large = bytes(1 << 20)
    stream = Memory(encoded([(wire.PROGRESS, b"", each) for each in range(500)] + [(wire.DATA, large, 0)]))
    link = Link(stream)
    for each in range(500):
        assert link.receive().offset == each
    assert len(stream.waited) == 1  # 500 headers of 24 bytes are less than what is read ahead
    assert link.read_bytes(link.receive(), len(large)) == large
    assert len(stream.waited) == 2  # what of the payload did not come with its header


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_the_parts_of_a_payload_arrive_as_one(parts: list[bytes]) -> None:
    stream = Memory()
    Link(stream).send(wire.DATA, *[memoryview(part) for part in parts], offset=7)
    assert next(received(stream.written)) == (wire.DATA, b"".join(parts), 7)


@given(
    st.dictionaries(
        st.text(), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8)
    )
)
def test_json_arrives_as_it_was_sent(fields: dict[str, object]) -> None:
    stream = Memory()
    Link(stream).send_json(wire.END, fields)
    link = Link(Memory(stream.written))
    assert link.read_json(link.receive()) == fields


def test_the_largest_frame_arrives() -> None:
    payload = bytes(wire.MAX_PAYLOAD)
    assert next(received(encoded([(wire.DATA, payload, 0)]))) == (wire.DATA, payload, 0)


def test_a_payload_can_be_read_in_pieces_and_is_checked_at_its_end() -> None:
    data = encoded([(wire.DATA, b"abcdef", 0), (wire.END, b"", 0)])
    link = Link(Memory(data))
    link.receive()
    room = bytearray(6)
    link.read_into(memoryview(room)[:4])
    link.read_into(memoryview(room)[4:])
    assert room == b"abcdef"
    assert link.receive().kind == wire.END

    damaged = Link(Memory(data.replace(b"abcdef", b"abcdeg")))
    damaged.receive()
    damaged.read_into(memoryview(room)[:4])
    with pytest.raises(ProtocolError, match="frame 0 was damaged on the way"):
        damaged.read_into(memoryview(room)[4:])


@pytest.mark.parametrize("flip", [1, 128, 255])
def test_every_flipped_byte_is_noticed(flip: int) -> None:
    data = encoded(FRAMES)
    for i in range(len(data)):
        damaged = data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :]
        arrived = []
        with pytest.raises((ProtocolError, ConnectionLost)):  # the second where a length became larger
            for frame in received(damaged):
                arrived.append(frame)
        assert arrived == FRAMES[: len(arrived)], i
        assert len(arrived) < len(FRAMES), i


def test_every_cut_is_a_lost_connection() -> None:
    data = encoded(FRAMES)
    for i in range(len(data)):
        arrived = []
        with pytest.raises(ConnectionLost, match="the connection ended"):
            for frame in received(data[:i]):
                arrived.append(frame)
        assert arrived == FRAMES[: len(arrived)], i
        assert len(arrived) < len(FRAMES), i


def test_a_frame_that_comes_twice_or_not_or_too_early_is_refused() -> None:
    pieces, stream = [], Memory()
    link = Link(stream)
    for kind, payload, offset in FRAMES:
        link.send(kind, payload, offset=offset)
        pieces.append(stream.written)
        stream.written = b""
    first, second, third, _ = pieces
    assert refused(first + first) == "frame 0 arrived in place of frame 1"
    assert refused(first + third) == "frame 2 arrived in place of frame 1"
    assert refused(first + third + second) == "frame 2 arrived in place of frame 1"
    assert refused(second) == "frame 1 arrived in place of frame 0"


@pytest.mark.parametrize("kind", [0, wire.SNAPSHOTS + 1, 255])
def test_a_frame_of_unknown_kind_is_refused(kind: int) -> None:
    assert refused(header(kind, 0)) == f"unknown frame {kind:02x}000000"


def test_a_frame_whose_padding_is_used_is_refused() -> None:
    data = bytearray(header(wire.DATA, 0))
    data[2] = 9
    assert refused(bytes(data)) == "unknown frame 0b000900"


@pytest.mark.parametrize("length", [wire.MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_an_oversized_frame_is_refused_before_there_is_room_for_it(length: int) -> None:
    data = header(wire.DATA, length)
    tracemalloc.start()
    try:
        assert refused(data) == f"oversized frame of {length} bytes"
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_an_oversized_control_frame_is_refused_before_there_is_room_for_it() -> None:
    size = wire.MAX_CONTROL + 1
    link = Link(Memory(header(wire.HELLO, size)))
    frame = link.receive()
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match=f"oversized frame of kind HELLO: {size} bytes"):
            link.read_json(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_reading_beyond_a_frame_is_refused() -> None:
    link = Link(Memory(encoded([(wire.DATA, b"abc", 0), (wire.DATA, b"def", 0)])))
    link.receive()
    with pytest.raises(ProtocolError, match="frame is 1 bytes short"):
        link.read_into(memoryview(bytearray(4)))


def test_reading_before_there_is_a_frame_is_refused() -> None:
    with pytest.raises(ProtocolError, match="frame is 1 bytes short"):
        Link(Memory(b"x")).read_into(memoryview(bytearray(1)))


def test_a_frame_without_an_offset_has_the_offset_0() -> None:
    stream = Memory()
    Link(stream).send(wire.TAKE)
    assert next(received(stream.written)) == (wire.TAKE, b"", 0)


def test_alive_with_a_payload_is_refused() -> None:
    assert refused(encoded([(wire.ALIVE, b"x", 0)])) == "frame of kind ALIVE with a payload"


@pytest.mark.parametrize("payload", [b"[]", b"1", b"null", b'"text"', b"true"])
def test_json_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="frame of kind HELLO is not a JSON object"):
        control(payload)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b'{"a": \xff}',
        b"\xef\xbb\xbf{}",
        b"{'a': 1}",
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'{"a":' * 100_000,
        b'{"a": ' + b"[" * 500_000 + b"]" * 500_000 + b"}",
    ],
    ids=["empty", "cut", "trailing", "not-utf8", "mark", "quotes", "huge-integer", "deep-objects", "deep-lists"],
)
def test_what_is_not_json_is_refused(payload: bytes) -> None:
    with pytest.raises(ProtocolError, match="frame of kind HELLO is not JSON"):
        control(payload)


@pytest.mark.parametrize("value", ["1", "null", "true", "1.0", "-1", "[1]", "1e3", "NaN", "Infinity"])
def test_a_field_that_is_no_whole_number_is_refused(value: str) -> None:
    fields = control(b'{"good": 5, "size": ' + (f'"{value}"' if value == "1" else value).encode() + b"}")
    assert wire.integers(fields, "good") == (5,)
    with pytest.raises(ProtocolError, match="field size of a control frame is missing or not valid"):
        wire.integers(fields, "good", "size")


@pytest.mark.parametrize("value", ["1", "null", "true", '["a"]', "{}"])
def test_a_field_that_is_no_text_is_refused(value: str) -> None:
    fields = control(b'{"good": "a", "name": ' + value.encode() + b"}")
    assert wire.text(fields, "good") == "a"
    for name in ("name", "missing"):
        with pytest.raises(ProtocolError, match=f"field {name} of a control frame is missing or not valid"):
            wire.text(fields, name)


def test_concurrent_senders_do_not_mix_their_frames() -> None:
    senders, count = 6, 150
    with linked() as (left, right, _):

        def send(number: int) -> None:
            for i in range(count):
                body = bytes([number]) * (1 + (i * 7919 + number) % 40_000)
                left.send(wire.DATA, body[:5], body[5:], offset=i)

        threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(senders)]
        for thread in threads:
            thread.start()
        seen = [0] * senders
        for _ in range(senders * count):
            frame = right.receive()
            body = right.read_bytes(frame, 40_000)
            assert frame.offset == seen[body[0]]
            assert body == body[:1] * (1 + (frame.offset * 7919 + body[0]) % 40_000)
            seen[body[0]] += 1
        for thread in threads:
            thread.join()
        assert seen == [count] * senders


def test_a_heartbeat_says_alive_until_it_is_stopped() -> None:
    said = threading.Semaphore(0)

    class Counting(Memory):
        def write(self, parts: Sequence[wire.Buffer]) -> None:
            super().write(parts)
            said.release()

    stream = Counting()
    heartbeat = wire.Heartbeat(Link(stream), interval_s=0.001)
    heartbeat.start()
    for _ in range(3):
        assert said.acquire(timeout=20)
    heartbeat.stop()
    heartbeat._thread.join(20)
    assert not heartbeat._thread.is_alive()
    kinds = {stream.written[i] for i in range(0, len(stream.written), wire.HEADER.size)}
    assert kinds == {wire.ALIVE}


def test_a_heartbeat_ends_with_its_link() -> None:
    class Broken(Memory):
        def write(self, parts: Sequence[wire.Buffer]) -> None:
            raise ConnectionLost("gone")

    heartbeat = wire.Heartbeat(Link(Broken()), interval_s=0.001)
    heartbeat.start()
    heartbeat._thread.join(20)
    assert not heartbeat._thread.is_alive()


def test_a_heartbeat_does_not_keep_its_process_from_ending() -> None:
    assert wire.Heartbeat(Link(Memory()), 1)._thread.daemon


def test_alive_does_not_disturb_a_receiver() -> None:
    stream = Memory()
    link = Link(stream)
    for kind, payload, offset in FRAMES:
        link.send_alive()
        link.send_alive()
        link.send(kind, payload, offset=offset)
    arrived = received(stream.written)
    assert [next(arrived) for _ in FRAMES] == FRAMES


def test_alive_does_not_wait_for_a_thread_that_is_sending() -> None:
    with linked() as (left, right, descriptors):
        sender = threading.Thread(target=left.send, args=(wire.DATA, bytes(1 << 20)), daemon=True)
        sender.start()
        full = select.poll()
        full.register(descriptors[3], select.POLLOUT)
        deadline = time.monotonic() + 20
        while full.poll(0):  # until the pipe is full, and the sender waits within its frame
            assert time.monotonic() < deadline
            time.sleep(0.001)
        left.send_alive()
        assert right.receive().length == 1 << 20
        right.read_into(memoryview(bytearray(1 << 20)))
        sender.join()
        left.send(wire.END)
        assert right.receive().kind == wire.END


def test_silence_is_a_lost_connection() -> None:
    with linked() as (left, _, _):
        left.silence_s = 0.01
        with pytest.raises(ConnectionLost, match=r"silent for 0\.01 s"):
            left.receive()


def test_silence_within_a_frame_is_a_lost_connection() -> None:
    with linked() as (left, _, descriptors):
        left.silence_s = 0.01
        os.write(descriptors[1], header(wire.DATA, 10) + b"abc")
        frame = left.receive()
        with pytest.raises(ConnectionLost, match=r"silent for 0\.01 s"):
            left.read_bytes(frame, 10)


def test_each_read_may_take_as_long_as_the_silence() -> None:
    stream = Memory(encoded(FRAMES))
    link = Link(stream, silence_s=17)
    link.read_json(link.receive())
    assert set(stream.waited) == {17}


def test_the_end_of_a_pipe_is_a_lost_connection_on_both_its_ends() -> None:
    down, up = os.pipe(), os.pipe()
    link = Link(wire.Pipe(down[0], up[1]))
    os.close(down[1])
    os.close(up[0])
    with pytest.raises(ConnectionLost, match="the connection ended"):
        link.receive()
    with pytest.raises(ConnectionLost, match="cannot write: Broken pipe"):
        link.send(wire.END)
    os.close(down[0])
    os.close(up[1])
    with pytest.raises(ConnectionLost, match="cannot read"):
        link.receive()


def test_the_bytes_that_came_are_counted() -> None:
    data = encoded(FRAMES)
    link = Link(Memory(data))
    for _ in FRAMES:
        link.read_bytes(link.receive(), 100)
    assert link.bytes_received == len(data)


def test_the_sequence_goes_on_beyond_32_bits() -> None:
    stream = Memory()
    link = Link(stream)
    link._sent = (1 << 32) - 1
    link.send(wire.PROGRESS, offset=1)
    link.send(wire.PROGRESS, offset=2)
    other = Link(Memory(stream.written))
    other._received = (1 << 32) - 1
    assert (other.receive().offset, other.receive().offset) == (1, 2)


def test_a_control_frame_says_what_it_says_in_ascii() -> None:
    """Paths and messages may hold anything; what travels is plain."""
    stream = Memory()
    Link(stream).send_json(wire.ERROR, {"message": "\udcff \x1b ü", "size": math.pi})
    body = stream.written[wire.HEADER.size :]
    assert body.isascii()
    assert b"\x1b" not in body
    assert json.loads(body)["message"] == "\udcff \x1b ü"


def test_an_agent_that_is_only_alive_is_given_up() -> None:
    """Heartbeats alone would hold a run, and the lock of its chain, for ever."""
    read_fd, write_fd = os.pipe()
    try:
        sender = wire.Link(wire.Pipe(read_fd, write_fd))
        for _ in range(3):
            sender.send_alive()
        receiver = wire.Link(wire.Pipe(read_fd, write_fd), stall_s=0)
        with pytest.raises(ConnectionLost, match="alive, but nothing done for 0 s"):
            receiver.receive()
    finally:
        os.close(read_fd)
        os.close(write_fd)


def test_an_agent_that_is_alive_is_waited_for() -> None:
    stream = Memory()
    sender = Link(stream)
    sender.send_alive()
    sender.send(wire.END)
    long_enough = time.monotonic()  # since this machine started
    assert Link(Memory(stream.written), stall_s=long_enough).receive().kind == wire.END
