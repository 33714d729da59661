"""Deltas that hold or claim far more than they should: verify and restore refuse them, by name and in little memory."""

import hashlib
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard
from isal import igzip_lib, isal_zlib

from blockdiff.shared.errors import EXIT_DAMAGED, EXIT_DONE
from tests.conftest import require_program
from tests.test_memory import SERVER_LIMIT

pytestmark = pytest.mark.torture

BLOCK = 4 << 20
#: Blocks of zeros in a bomb: several times what the server may hold, and what its table says.
BLOCKS, KNOWN_BLOCKS = 96, 2
#: The largest window that zstd takes from others by default: what was compressed with --long must stay readable.
WINDOW = 128 << 20
#: What the whole process may map: the stacks of its threads and all libraries are in it. lzop has as much.
ADDRESS_SPACE = 1 << 30
#: Runs `blockdiff` as on a machine of 8 CPUs, where most is read ahead, and tells the most memory that it held, in KiB.
PROGRAM = f"""
import atexit, resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE}))
from blockdiff.shared import pipeline
from blockdiff.cli.modern import main
pipeline.worker_count = lambda: 8
def tell_peak():
    with open("/proc/self/status") as file:
        print(next(line for line in file if line.startswith("VmHWM")))
atexit.register(tell_peak)
main()
"""


def blocks(count: int) -> Iterator[bytes]:
    """Yield a delta of version 1 of so many blocks of zeros, in pieces."""
    yield struct.pack("<I", BLOCK)
    for number in range(count):
        yield struct.pack("<Q", number * BLOCK)
        yield bytes(BLOCK)


def gzip_member() -> bytes:
    deflate = isal_zlib.compressobj(1, isal_zlib.DEFLATED, 31)
    return b"".join(map(deflate.compress, blocks(BLOCKS))) + deflate.flush()


def sized_gzip_member(claimed: int) -> bytes:
    """A member that tells its size in the file, and a wrong one of its content."""
    body = igzip_lib.compress(b"".join(blocks(BLOCKS)), 1, flag=igzip_lib.COMP_DEFLATE)
    head = bytes.fromhex("1f8b0804 00000000 00ff 0800 4244 0400")
    size = len(head) + 4 + len(body) + 8
    return head + struct.pack("<I", size) + body + struct.pack("<II", 0, claimed)


def zstd_frame(window_log: int | None = None, claimed: int | None = None) -> bytes:
    """A frame whose header tells its content's size where that is `claimed`, true or not."""
    parameters = zstandard.ZstdCompressionParameters.from_level(
        1, **({} if window_log is None else {"window_log": window_log}), write_content_size=claimed is not None
    )
    content = b"".join(blocks(BLOCKS))
    deflate = zstandard.ZstdCompressor(compression_params=parameters).compressobj(
        size=-1 if claimed is None else len(content)
    )
    frame = deflate.compress(content) + deflate.flush()
    if claimed is None:
        return frame
    place = 6  # behind magic, descriptor, and window: a field of 4 bytes
    assert frame[place : place + 4] == struct.pack("<I", len(content))
    return frame[:place] + struct.pack("<I", claimed) + frame[place + 4 :]


def sized_zstd_frame(claimed: int) -> bytes:
    frame = zstd_frame(claimed=claimed)
    return bytes.fromhex("502a4d18 04000000") + struct.pack("<I", len(frame)) + frame


def lzop_file() -> bytes:
    require_program("lzop")
    return subprocess.run(["lzop", "-c"], input=b"".join(blocks(BLOCKS)), capture_output=True, check=True).stdout


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "gzip": (".gz", gzip_member),
    "gzip that says it is small": (".gz", lambda: sized_gzip_member(1000)),
    "gzip that says how large it is": (".gz", lambda: sized_gzip_member(BLOCKS * BLOCK)),
    "zstd": (".zst", zstd_frame),
    "zstd with a window of 128 MiB": (".zst", lambda: zstd_frame(window_log=27)),
    "zstd with a window of 1 GiB": (".zst", lambda: zstd_frame(window_log=30)),
    "zstd that says it is small": (".zst", lambda: sized_zstd_frame(1000)),
    "zstd that says how large it is": (".zst", lambda: sized_zstd_frame(BLOCKS * BLOCK + 4 + 8 * BLOCKS)),
    "lzop": (".lzop", lzop_file),
}


def new_chain(directory: Path, suffix: str, delta: bytes, count: int) -> Path:
    """Return the NAME of a chain like the original's: a delta, and a table of `count` blocks of zeros."""
    name = directory / "backup" / "disk"
    name.parent.mkdir()
    Path(f"{name}.1{suffix}").write_bytes(delta)
    table = struct.pack("<I", BLOCK) + hashlib.md5(bytes(BLOCK)).digest() * count
    Path(f"{name}.1.md5").write_bytes(table)
    Path(f"{name}.ver").write_text("1\n")
    return name


def run(*words: str | Path, limit: int = SERVER_LIMIT) -> tuple[int, str]:
    """Run `blockdiff`, which must stay within its memory; return its exit status and what it said."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=False)
    peak = int(result.stdout.rpartition("VmHWM:")[2].split()[0]) << 10
    print(f"{words[0]}: {peak >> 20} MiB, {result.stderr}")
    assert 8 << 20 < peak < limit
    return result.returncode, result.stderr


@pytest.mark.parametrize("command", ["verify", "restore"])
@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs(tmp_path: Path, bomb: str, command: str) -> None:
    suffix, content = BOMBS[bomb]
    limit = SERVER_LIMIT + (WINDOW if bomb == "zstd with a window of 128 MiB" else 0)
    delta = content()
    assert len(delta) < 8 << 20
    name = new_chain(tmp_path, suffix, delta, KNOWN_BLOCKS)
    status, said = run(command, name, *([tmp_path / "image"] if command == "restore" else []), limit=limit)
    assert status == EXIT_DAMAGED
    assert f"{name}.1" in said


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".lzop"])
def test_what_is_as_large_as_it_should_be_is_no_bomb(tmp_path: Path, suffix: str) -> None:
    content = {".gz": gzip_member, ".zst": zstd_frame, ".lzop": lzop_file}[suffix]
    name = new_chain(tmp_path, suffix, content(), BLOCKS)
    assert run("verify", name) == (EXIT_DONE, "")
    assert run("restore", name, tmp_path / "image") == (EXIT_DONE, "")
    assert (tmp_path / "image").stat().st_size == BLOCKS * BLOCK
