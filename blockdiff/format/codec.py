"""Compression: independent members written, any number of them read, on several threads.

A compressed file is a sequence of members (gzip) or frames (zstd) of a few MiB, each of which can be decompressed by
itself; `gunzip` and `zstd -d` read them as always. Each says how long it is (`docs/format.md`), so that a reader can
hand the next one to another thread without decompressing this one. Files without those marks, such as the original's,
are read as well, on one thread.
"""

import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple, Protocol, cast

import zstandard
from isal import igzip_lib, isal_zlib

from blockdiff.format import lzop
from blockdiff.shared import pipeline
from blockdiff.shared.errors import BlockdiffError, DamagedError, ProcessError, StorageError, UsageError

#: The suffix of a delta by the name of its compression.
SUFFIXES = {"gzip": ".gz", "zstd": ".zst", "lzop": ".lzop", "none": ""}
#: What `--compression` may be, with the levels and the default level of each.
LEVELS = {"gzip": (1, 9, 2), "zstd": (1, 19, 1), "none": (0, 0, 0)}

#: Largest member that is decompressed in one piece, in bytes before compression. We write much smaller ones.
MAX_MEMBER = 16 << 20
_CHUNK = 1 << 20
# Members that are under way or wait, decompressed, for who uses them: some take ten times as long as others, and so
# does what is done with them. With 3, as for 2 CPUs elsewhere, restores and verify take 5 to 10 % longer.
_AHEAD = 6

#: Longest stored block of deflate; how many samples of a member decide whether it is worth compressing, and their size.
_STORED_LIMIT = 0xFFFF
_SAMPLES = 4
_SAMPLE_SIZE = 8 << 10

_GzipError = cast("type[Exception]", igzip_lib.IsalError)  # its stub takes the class for an instance
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_LZOP_MAGIC = b"\x89LZO\0\r\n\x1a\n"
# a gzip header with one extra field, "BD", of 4 bytes: the size of the whole member, header and trailer included
_GZIP_SIZED = bytes.fromhex("1f8b0804 00000000 00ff 0800 4244 0400")
_GZIP_HEADER_SIZE = len(_GZIP_SIZED) + 4
# a skippable frame of 4 bytes, as pzstd writes: the size of the frame that follows
_ZSTD_SIZED = bytes.fromhex("502a4d18 04000000")
_ZSTD_HEADER_SIZE = len(_ZSTD_SIZED) + 4


def compressor(name: str, level: int | None = None) -> Callable[[bytes | memoryview], bytes]:
    """Return a function that makes one member of some bytes; threads may share it.

    gzip levels 1 to 3 are isal's (level 2 has about the ratio of ``gzip -1`` at seven times its speed), 4 to 9 zlib's;
    zstd has 1 to 19. Raises `UsageError` for another level.
    """
    if name not in LEVELS:
        raise UsageError(f"unknown compression {name}", f"choose one of {', '.join(LEVELS)}")
    lowest, highest, default = LEVELS[name]
    chosen = default if level is None else level
    if not lowest <= chosen <= highest:
        raise UsageError(f"{name} has no level {chosen}", f"choose --level {lowest} to {highest}")
    if name == "none":
        return bytes
    if name == "gzip":
        return lambda data: _gzip_member(data, chosen)
    local = threading.local()  # a compressor may not be shared, and a new one for each frame costs fresh memory

    def compress(data: bytes | memoryview) -> bytes:
        if not hasattr(local, "zstd"):
            local.zstd = zstandard.ZstdCompressor(level=chosen, write_checksum=True, write_content_size=True)
        frame = local.zstd.compress(data)
        return b"".join((_ZSTD_SIZED, len(frame).to_bytes(4, "little"), frame))

    return compress


def _gzip_member(data: bytes | memoryview, level: int) -> bytes:
    if level > 3:
        deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
        parts: list[bytes | memoryview] = [deflate.compress(data), deflate.flush()]
    elif _is_incompressible(data):
        parts = list(_stored(memoryview(data)))
    else:
        parts = [_deflated(data, level)]
    size = _GZIP_HEADER_SIZE + sum(map(len, parts)) + 8
    trailer = isal_zlib.crc32(data).to_bytes(4, "little") + len(data).to_bytes(4, "little")
    return b"".join((_GZIP_SIZED, size.to_bytes(4, "little"), *parts, trailer))


def _deflated(data: bytes | memoryview, level: int) -> bytes:
    return igzip_lib.compress(data, level, flag=igzip_lib.COMP_DEFLATE, mem_level=igzip_lib.MEM_LEVEL_LARGE)


def _is_incompressible(data: bytes | memoryview) -> bool:
    """Look at samples: what does not shrink there is stored as it is, an order of magnitude faster."""
    step = len(data) // _SAMPLES
    if step < _SAMPLE_SIZE:
        return False
    samples = [data[i * step : i * step + _SAMPLE_SIZE] for i in range(_SAMPLES)]
    return all(len(_deflated(sample, 1)) >= len(sample) for sample in samples)


def _stored(view: memoryview) -> Iterator[bytes | memoryview]:
    """Yield the stored blocks of RFC 1951: 3 bits that say so, the length, its complement, and the bytes."""
    for start in range(0, len(view), _STORED_LIMIT):
        piece = view[start : start + _STORED_LIMIT]
        is_last = start + len(piece) == len(view)
        yield struct.pack("<BHH", is_last, len(piece), len(piece) ^ 0xFFFF)
        yield piece


class Readable(Protocol):
    """A file that is read forwards."""

    def read(self, count: int, /) -> bytes:
        """Return up to `count` bytes, b"" at the end."""


class _Input:
    """A file that is read forwards, with room to put back what was read too far."""

    def __init__(self, file: Readable, where: str) -> None:
        self._file = file
        self._back = b""
        self.where = where

    def read(self, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end of the file."""
        parts = [self._back[:count]] if self._back else []  # joining a single part copies nothing
        self._back = self._back[count:]
        missing = count - sum(map(len, parts))
        try:
            while missing:
                part = self._file.read(missing)
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise StorageError(f"cannot read {self.where}: {error.strerror}") from error
        return b"".join(parts)

    def put_back(self, data: bytes) -> None:
        """Let the next `read` begin with `data`."""
        self._back = data + self._back

    @property
    def waiting(self) -> int:
        """How many bytes were put back."""
        return len(self._back)

    def cut_off(self, what: str) -> DamagedError:
        """Return the error for a file that ends too early."""
        return DamagedError(f"{self.where} is cut off in the middle of a {what}", "use another copy of it")

    def damaged(self, why: object) -> DamagedError:
        """Return the error for a file that cannot be decompressed."""
        return DamagedError(f"{self.where} is damaged: {why}", "use another copy of it")


Task = Callable[[], bytes]


def decompressed(file: Readable, where: str, name: str | None = None) -> Iterator[bytes]:
    """Yield the content of a compressed file in pieces of at most `MAX_MEMBER` bytes, members on several threads.

    `name` is the compression; None looks at the first bytes. `where` names the file in messages. Raises `DamagedError`
    for a file that is cut off or damaged, at its place in the order.
    """
    source = _Input(file, where)
    if name is None:
        first = source.read(len(_LZOP_MAGIC))
        source.put_back(first)
        name = _sniff(first)
    if name == "lzop":
        return _lzop_pieces(source)
    tasks = {"none": _plain_tasks, "gzip": _gzip_tasks, "zstd": _zstd_tasks}[name](source)
    return pipeline.in_order(lambda task: task(), _with_errors(tasks), ahead=max(_AHEAD, pipeline.worker_count() + 1))


class Sound(NamedTuple):
    """A piece of a damaged file that can be decompressed.

    `begins_file` and `begins_member` say where it does not continue the piece before it.
    """

    data: bytes
    begins_file: bool
    begins_member: bool


def sound_pieces(file: BinaryIO, where: str, name: str) -> Iterator[Sound]:
    """Yield what can be decompressed of a file, whatever is wrong with the rest; raises nothing but `StorageError`.

    After damage it continues at the next member that says how long it is; if none does, there is nothing more.
    """
    begin, end = -1, 0
    while end > begin:
        begin = end
        source = _at(file, begin, where)
        begins = True
        try:
            for data in _next_member(source, name):
                yield Sound(data, begins and begin == 0, begins)
                begins = False
            end = file.tell() - source.waiting
        except DamagedError:
            end = _find_sized(file, begin + 1, where, name)


def _at(file: BinaryIO, offset: int, where: str) -> _Input:
    file.seek(offset)
    return _Input(file, where)


def _next_member(source: _Input, name: str) -> Iterator[bytes]:
    """Yield the pieces of the next member; all pieces if the compression has none."""
    if name in ("none", "lzop"):
        yield from _lzop_pieces(source) if name == "lzop" else (task() for task in _plain_tasks(source))
        return
    sized, tasks, magic, stream = {
        "gzip": (_GZIP_SIZED, _gzip_tasks, _GZIP_MAGIC, _gzip_stream),
        "zstd": (_ZSTD_SIZED, _zstd_tasks, _ZSTD_MAGIC, _zstd_stream),
    }[name]
    header = source.read(len(sized))
    source.put_back(header)
    if header.startswith(sized):
        yield next(tasks(source))()
    elif header.startswith(magic):
        yield from stream(source)
    elif header:
        raise source.damaged("no member begins here")


def _find_sized(file: BinaryIO, offset: int, where: str, name: str) -> int:
    """Return where the next member seems to begin that says how long it is, from `offset` on; -1 for nowhere."""
    sized = {"gzip": _GZIP_SIZED, "zstd": _ZSTD_SIZED}.get(name)
    source = _at(file, offset, where)
    while sized is not None and len(data := source.read(_CHUNK)) >= len(sized):
        found = data.find(sized)
        if found >= 0:
            return offset + found
        offset += len(data) - len(sized) + 1
        source.put_back(data[1 - len(sized) :])
    return -1


def _with_errors(tasks: Iterator[Task]) -> Iterator[Task]:
    """Make an error of the reading a task like others: what was read before it is still used."""
    try:
        yield from tasks
    except (DamagedError, StorageError) as error:
        yield _failing(error)


def _failing(error: BlockdiffError) -> Task:
    def task() -> bytes:
        raise error

    return task


def _sniff(first: bytes) -> str:
    if first.startswith(_GZIP_MAGIC + b"\x08"):
        return "gzip"
    if first.startswith((_ZSTD_MAGIC, _ZSTD_SIZED[:4])):
        return "zstd"
    return "lzop" if first == _LZOP_MAGIC else "none"


def _given(data: bytes) -> Task:
    return lambda: data


def _plain_tasks(source: _Input) -> Iterator[Task]:
    while data := source.read(_CHUNK):
        yield _given(data)


def _gzip_tasks(source: _Input) -> Iterator[Task]:
    while header := source.read(_GZIP_HEADER_SIZE):
        if header.startswith(_GZIP_SIZED) and len(header) == _GZIP_HEADER_SIZE:
            size = int.from_bytes(header[-4:], "little")
            if not _GZIP_HEADER_SIZE + 8 < size <= 2 * MAX_MEMBER:
                raise source.damaged("a gzip member has an impossible size")
            rest = source.read(size - len(header))
            if len(rest) < size - len(header):
                raise source.cut_off("gzip member")
            yield _sized_gzip(source, rest)
        elif header.startswith(_GZIP_MAGIC):
            source.put_back(header)
            yield from (_given(data) for data in _gzip_stream(source))
        elif _GZIP_MAGIC.startswith(header):
            raise source.cut_off("gzip member")
        else:
            raise source.damaged("what follows a gzip member is not one")


def _sized_gzip(source: _Input, rest: bytes) -> Task:
    """`rest` is what follows the header of a member.

    Its last bytes are the CRC-32 and the size of the content: a buffer of that size is filled at once, while one that
    grows costs a third more.
    """

    def task() -> bytes:
        crc, size = struct.unpack("<II", rest[-8:])
        if size > MAX_MEMBER:
            raise source.damaged("a gzip member has an impossible size")
        inflate = igzip_lib.IgzipDecompressor(igzip_lib.DECOMP_DEFLATE)
        try:
            data = inflate.decompress(memoryview(rest)[:-8], size + 1)
        except _GzipError as error:
            raise source.damaged(error) from error
        if not inflate.eof or inflate.unused_data or len(data) != size:
            raise source.damaged("a gzip member does not end where it says")
        if isal_zlib.crc32(data) != crc:
            raise source.damaged("the checksum of a gzip member does not match its content")
        return data

    return task


def _gzip_stream(source: _Input) -> Iterator[bytes]:
    """Yield the content of one member whose size is not known beforehand, and put back what follows it."""
    inflate = isal_zlib.decompressobj(wbits=31)
    data = source.read(_CHUNK)
    while True:
        try:
            piece = inflate.decompress(data, _CHUNK)
        except _GzipError as error:
            raise source.damaged(error) from error
        if piece:
            yield piece
        if inflate.eof:
            source.put_back(inflate.unused_data)
            return
        data = inflate.unconsumed_tail or source.read(_CHUNK)
        if not data and not piece:
            raise source.cut_off("gzip member")


def _zstd_tasks(source: _Input) -> Iterator[Task]:
    while header := source.read(_ZSTD_HEADER_SIZE):
        if header.startswith(_ZSTD_SIZED) and len(header) == _ZSTD_HEADER_SIZE:
            size = int.from_bytes(header[-4:], "little")
            if size > 2 * MAX_MEMBER:
                raise source.damaged("a zstd frame has an impossible size")
            frame = source.read(size)
            if len(frame) < size:
                raise source.cut_off("zstd frame")
            yield _sized_zstd(source, frame)
        elif header.startswith(_ZSTD_MAGIC):
            source.put_back(header)
            yield from (_given(data) for data in _zstd_stream(source))
        elif _ZSTD_MAGIC.startswith(header) or _ZSTD_SIZED.startswith(header[: len(_ZSTD_SIZED)]):
            raise source.cut_off("zstd frame")
        else:
            raise source.damaged("what follows a zstd frame is not one")


def _sized_zstd(source: _Input, frame: bytes) -> Task:
    def task() -> bytes:
        try:
            size = zstandard.frame_content_size(frame)
            if not 0 < size <= MAX_MEMBER:  # we write no empty ones, and `decompress` does not look into them
                raise source.damaged("a zstd frame has an impossible size")
            return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise source.damaged(error) from error

    return task


def _zstd_stream(source: _Input) -> Iterator[bytes]:
    """Yield the content of one frame whose size is not known beforehand, and put back what follows it.

    A few bytes of zstd may hold 128 KiB, and `decompressobj` has no limit: small inputs bound what it returns, and
    smaller ones keep that small while it continues.
    """
    least, most = 16, 512
    count = least
    inflate = zstandard.ZstdDecompressor().decompressobj()
    while not inflate.eof:
        data = source.read(count)
        if not data:
            raise source.cut_off("zstd frame")
        try:
            piece = inflate.decompress(data)
        except zstandard.ZstdError as error:
            raise source.damaged(error) from error
        if piece:
            yield piece
        count = least if len(piece) > _CHUNK else min(2 * count, most)
    source.put_back(inflate.unused_data)


def _lzop_pieces(source: _Input) -> Iterator[bytes]:
    try:
        yield from lzop.pieces(source.read)
    except ProcessError as error:
        raise source.damaged(error) from error
