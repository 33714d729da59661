"""The bundle that is really shipped, under every Python of this machine that a host could have."""

import hashlib
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff.shared import wire
from blockdiff.shared.blocks import digest_named
from blockdiff.shared.errors import ProtocolError, SourceError, UsageError
from tests import agents
from tests.interpreters import INTERPRETERS

BLOCK = 4096
#: More than the agent and the pipe to us can hold: an agent that nobody listens to is stuck before the end of it.
LONG = 32 << 20


@pytest.fixture(params=INTERPRETERS)
def command(request: pytest.FixtureRequest) -> list[str]:
    return agents.command(INTERPRETERS[request.param])


@pytest.fixture(autouse=True)
def empty_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Whatever a program would leave in the directory it runs in, at home, or where temporary files go, shows here."""
    directory = tmp_path_factory.mktemp("host")
    monkeypatch.chdir(directory)
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(directory))
    yield directory
    assert os.listdir(directory) == []


def digest_table(image: bytes, block_size: int = BLOCK) -> bytes:
    blocks = [image[i : i + block_size] for i in range(0, len(image), block_size)]
    return b"".join(hashlib.sha256(block).digest() for block in blocks)


def image_file(path: Path) -> bytes:
    """Make a source with data, a hole, written zeros, single blocks of either, and a short tail; return its bytes."""
    noise = random.Random(5)
    with path.open("wb") as file:
        file.write(noise.randbytes(3 * BLOCK))
        file.seek((5 << 20) + 3 * BLOCK)
        file.write(noise.randbytes(5 << 20))
        file.write(bytes(9 * BLOCK) + noise.randbytes(BLOCK) + bytes(BLOCK) + noise.randbytes(BLOCK - 1) + b"\0")
        file.write(bytes(BLOCK - 1) + b"!" + b"tail")
    return path.read_bytes()


def long_file(path: Path) -> Path:
    path.write_bytes(b"\x5a" * LONG)
    return path


def test_a_full_run(command: list[str], tmp_path: Path) -> None:
    image = image_file(tmp_path / "image")
    outcome = agents.dump(tmp_path / "image", command)
    assert outcome.source == {"kind": "file", "size": len(image)}
    assert outcome.applied_to() == image
    zeros = [(offset, length) for offset, length, data in outcome.runs if data is None]
    start = (10 << 20) + 3 * BLOCK
    assert zeros == [(3 * BLOCK, 5 << 20), (start, 9 * BLOCK), (start + 10 * BLOCK, BLOCK)]
    blocks = -(-len(image) // BLOCK)
    assert outcome.progress[-1] == len(image)
    assert outcome.totals == {
        "image_size": len(image),
        "changed_blocks": blocks,
        "read": len(image) - (5 << 20),  # the hole was not
        "touched": False,
        "how": "",
        "notes": [],
    }


def test_an_incremental_run(command: list[str], tmp_path: Path) -> None:
    path = tmp_path / "image"
    before = image_file(path)
    with path.open("r+b") as file:
        file.seek(2 * BLOCK + 7)
        file.write(b"new")
        file.seek(6 << 20)
        file.write(bytes(2 * BLOCK))
        file.seek(0, os.SEEK_END)
        file.write(b"longer tail")
    after = path.read_bytes()
    changed = [i for i in range(0, len(after), BLOCK) if before[i : i + BLOCK] != after[i : i + BLOCK]]
    outcome = agents.dump(path, command, digest_table(before))
    assert outcome.applied_to(before) == after
    assert [i for offset, length, _ in outcome.runs for i in range(offset, offset + length, BLOCK)] == changed
    assert outcome.totals["changed_blocks"] == len(changed)


def test_an_incremental_run_in_which_nothing_changed(command: list[str], tmp_path: Path) -> None:
    image = image_file(tmp_path / "image")
    outcome = agents.dump(tmp_path / "image", command, digest_table(image))
    assert outcome.runs == []
    assert outcome.totals["changed_blocks"] == 0


def test_a_digest_table_that_is_larger_than_what_the_agent_holds(command: list[str], tmp_path: Path) -> None:
    block_size = 16
    image = random.Random(1).randbytes(50_000 * block_size)
    table = digest_table(image, block_size)
    assert len(table) > wire.TABLE_WINDOW
    changed = bytearray(image)
    changed[777_777] ^= 1
    (tmp_path / "image").write_bytes(changed)
    outcome = agents.dump(tmp_path / "image", command, table, block_size=block_size)
    start = 777_777 // block_size * block_size
    assert outcome.runs == [(start, block_size, bytes(changed[start : start + block_size]))]


@pytest.mark.parametrize("size", [1, BLOCK, 3 * BLOCK + 5])
def test_an_image_that_shrank_needs_only_the_digests_that_it_has_blocks_for(
    command: list[str], tmp_path: Path, size: int
) -> None:
    before = random.Random(2).randbytes(5 * BLOCK)
    (tmp_path / "image").write_bytes(before[:size])
    outcome = agents.dump(tmp_path / "image", command, digest_table(before))
    assert outcome.applied_to(before) == before[:size]
    assert len(outcome.runs) == (size % BLOCK != 0)


@pytest.mark.parametrize("digest", ["sha256", "blake2b", "md5"])
def test_every_digest_that_needs_no_other_package(command: list[str], tmp_path: Path, digest: str) -> None:
    image = random.Random(3).randbytes(BLOCK + 1)
    (tmp_path / "image").write_bytes(image)
    table = b"".join(digest_named(digest).new(memoryview(b)).digest() for b in (image[:BLOCK], image[BLOCK:]))
    with agents.conversation(command) as talk:
        digests = talk.hello["digests"]
        assert isinstance(digests, list)
        assert digest in digests
        talk.request(tmp_path / "image", digest=digest, table_blocks=2)
        assert talk.receive(table, len(table) // 2).runs == []


def test_a_digest_that_is_not_there(command: list[str], tmp_path: Path) -> None:
    image_file(tmp_path / "image")
    error = agents.failure(tmp_path / "image", command, digest="crc32")
    assert type(error) is UsageError
    assert error.message == "host: python on this machine cannot compute crc32 digests"


def source_that_is(what: str, directory: Path) -> Path:
    path = directory / "source"
    if what == "a directory":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "a fifo":
        os.mkfifo(path)
    elif what == "a terminal":
        return Path("/dev/null")
    elif what == "a dangling link":
        path.symlink_to("nowhere")
    return path


@pytest.mark.parametrize(
    ("what", "words", "hint"),
    [
        ("missing", "cannot open {}: No such file or directory", None),
        ("a dangling link", "cannot open {}: No such file or directory", None),
        ("a directory", "{} is a directory", "name a file, a disk or a logical volume"),
        (
            "empty",
            "{} is empty: there is nothing to back up",
            "is the path right, and is its device attached?",
        ),
        ("a fifo", "{} is neither a regular file nor a block device", "name a file, a disk or a logical volume"),
        ("a terminal", "{} is neither a regular file nor a block device", "name a file, a disk or a logical volume"),
    ],
)
def test_a_source_that_is_no_image(command: list[str], tmp_path: Path, what: str, words: str, hint: str | None) -> None:
    path = source_that_is(what, tmp_path)
    error = agents.failure(path, command)
    assert type(error) is SourceError
    assert error.message == "host: " + words.format(path)
    assert error.hint == hint


@pytest.mark.parametrize("name", [b"\xff\xfe", b"a b'\"$(touch x)\n;", "ü".encode(), b"-rf"])
def test_a_source_of_any_name(command: list[str], tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write(b"content")
    assert agents.dump(path, command).applied_to() == b"content"
    os.unlink(path)
    error = agents.failure(path, command)
    assert error.message.startswith("host: cannot open ")
    assert error.message.isprintable()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_ends_an_agent_that_nobody_listens_to(
    command: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.request(path)
        talk.expect(wire.SOURCE)
        talk.child._child.send_signal(number)
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
        assert talk.child.stderr() == f"blockdiff agent: stopped by {number.name}\n"


@pytest.mark.parametrize("when", ["before the request", "while it sends", "while it waits for digests"])
def test_the_end_of_the_server_ends_the_agent(command: list[str], tmp_path: Path, when: str) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        if when == "while it sends":
            talk.request(path)
            talk.expect(wire.SOURCE)
        elif when == "while it waits for digests":
            talk.request(path, table_blocks=LONG // BLOCK)
            talk.link.read_json(talk.expect(wire.SOURCE))
            talk.expect(wire.WANT)
        talk.child._input.close()
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
        assert talk.child.stderr() == "blockdiff agent: the connection ended\n"


def test_nobody_there_to_read_ends_the_agent(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.request(path)
        talk.expect(wire.SOURCE)
        talk.child._output.close()
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
        assert talk.child.stderr() == "blockdiff agent: cannot write: Broken pipe\n"


def test_a_source_that_shrinks_fails(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.request(path)
        source = talk.expect(wire.SOURCE)
        talk.link.read_json(source)
        os.truncate(path, BLOCK)  # the agent cannot have come to the end: nobody has read what it sends
        with pytest.raises(SourceError) as caught:
            while True:
                talk.link.read_bytes(talk.next(), wire.MAX_PAYLOAD)
        assert caught.value.message == f"host: {path} shrank from {LONG} to {BLOCK} bytes while it was read"
        assert caught.value.hint == "back up a snapshot, or run again when nothing resizes it"
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)


def test_a_source_that_shrinks_after_its_last_byte_was_read_fails(command: list[str], tmp_path: Path) -> None:
    """Its end is a hole, which nobody reads: only the size tells."""
    path = long_file(tmp_path / "image")
    os.truncate(path, 2 * LONG)
    with agents.conversation(command) as talk:
        talk.request(path)
        talk.link.read_json(talk.expect(wire.SOURCE))
        os.truncate(path, LONG)
        with pytest.raises(SourceError, match=f"shrank from {2 * LONG} to {LONG} bytes"):
            while True:
                talk.link.read_bytes(talk.next(), wire.MAX_PAYLOAD)


def test_a_source_that_grows_ends_where_it_ended_at_the_start(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.request(path)
        source = talk.link.read_json(talk.expect(wire.SOURCE))
        with path.open("ab") as file:
            file.write(b"more")
        received = 0
        while (frame := talk.next()).kind != wire.TOTALS:
            talk.link.read_bytes(frame, wire.MAX_PAYLOAD)
            received += frame.length if frame.kind == wire.DATA else 0
        totals = talk.link.read_json(frame)
        assert (source["size"], received, totals["image_size"]) == (LONG, LONG, LONG)
        assert totals["touched"] is True


def test_a_source_that_is_written_to_is_reported_as_touched(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.request(path)
        talk.link.read_json(talk.expect(wire.SOURCE))
        with path.open("r+b") as file:
            file.write(b"\x5b")
        while (frame := talk.next()).kind != wire.TOTALS:
            talk.link.read_bytes(frame, wire.MAX_PAYLOAD)
        assert talk.link.read_json(frame)["touched"] is True


@pytest.mark.parametrize("block_size", [0, (4 << 20) + 1])
def test_a_block_size_out_of_range_is_refused(command: list[str], tmp_path: Path, block_size: int) -> None:
    (tmp_path / "image").write_bytes(b"x")
    error = agents.failure(tmp_path / "image", command, block_size=block_size)
    assert type(error) is ProtocolError
    assert error.message == f"host: block size {block_size} is out of range"


def test_a_server_that_breaks_the_protocol_is_told_so(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    with agents.conversation(command) as talk:
        talk.link.send(wire.DATA, b"?")
        error = talk.failure()
        assert error.message == "host: the server sent an unexpected frame of kind DATA"
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
    with agents.conversation(command) as talk:
        talk.request(path, table_blocks=1)
        talk.link.send(wire.TABLE, bytes(33))  # before it was wanted, and more than there is
        error = talk.failure()
        assert error.message == "host: the server sent more of the digest table than was asked for"


#: Prints, and starts programs that print, as soon as the agent has moved standard output out of their way.
STRAY_PRINTS = """
import os, sys, threading, time
def chatter():
    while not os.path.sameopenfile(1, 2):
        time.sleep(0.001)
    while True:
        os.write(1, b"stray\\n")
        os.system("echo stray child")
        time.sleep(0.002)
threading.Thread(target=chatter, daemon=True).start()
exec(bytes.fromhex(sys.argv[2]))
"""


def test_stray_prints_do_not_get_between_the_frames(command: list[str], tmp_path: Path) -> None:
    path = long_file(tmp_path / "image")
    where = command.index("-c") + 1
    chatty = [*command[:where], STRAY_PRINTS, *command[where + 1 :]]
    with agents.conversation(chatty) as talk:
        talk.request(path)
        assert sum(length for _, length, _ in talk.receive().runs) == LONG
        assert talk.child.wait(agents.PROMPTLY_S) == (0,)
        assert "stray\n" in talk.child.stderr()


def test_a_server_that_sends_no_frames_is_told_so(command: list[str]) -> None:
    with agents.conversation(command) as talk:
        talk.link._carrier.write([b"#" * wire.HEADER.size])
        with pytest.raises(ProtocolError, match="host: unknown frame 23232323"):
            talk.next()
        assert talk.child.wait(agents.PROMPTLY_S) == (1,)
