"""Compression and decompression, on several threads.

A compressed file is a sequence of members (gzip) or frames (zstd) of a few MiB. Each can be decompressed without the
others, and `gunzip` and `zstd -d` read the file as any other. Each states its size (`docs/format.md`), so that a reader
can give the next one to another thread without decompressing this one first. Files whose members do not state their
size, such as the original's, are read on one thread.
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

#: The suffix of a delta, by the name of its compression.
SUFFIXES = {"gzip": ".gz", "zstd": ".zst", "lzop": ".lzop", "none": ""}
#: The values of `--compression`, each with its lowest, highest and default level.
LEVELS = {"gzip": (1, 9, 2), "zstd": (1, 19, 1), "none": (0, 0, 0)}

#: Largest member that is decompressed in one piece, in bytes before compression. blockdiff writes smaller ones.
MAX_MEMBER = 16 << 20
_CHUNK = 1 << 20
# How many members are being decompressed, or wait, decompressed, to be used. Some members take ten times as long as
# others, to decompress and to use. With 3, which is what `in_order` has for 2 CPUs, restore and verify take 5 to 10 %
# longer.
_AHEAD = 6

#: Longest stored block of deflate; the number and size of the samples that decide whether a member is compressed.
_STORED_LIMIT = 0xFFFF
_SAMPLES = 4
_SAMPLE_SIZE = 8 << 10

_GzipError = cast("type[Exception]", igzip_lib.IsalError)  # the stub declares an instance
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
    """Return a function that compresses some bytes into one member; threads may share it.

    gzip levels 1 to 3 are isal's (level 2 has about the ratio of ``gzip -1`` at seven times its speed), 4 to 9 are
    zlib's; zstd has 1 to 19. Raises `UsageError` for another level.
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
    local = threading.local()  # threads may not share a compressor, and one for each frame allocates memory again

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
    """Return whether samples do not shrink; then the data is stored uncompressed, which is ten times as fast."""
    step = len(data) // _SAMPLES
    if step < _SAMPLE_SIZE:
        return False
    samples = [data[i * step : i * step + _SAMPLE_SIZE] for i in range(_SAMPLES)]
    return all(len(_deflated(sample, 1)) >= len(sample) for sample in samples)


def _stored(view: memoryview) -> Iterator[bytes | memoryview]:
    """Yield the stored blocks of RFC 1951: a byte that is 1 for the last, the length, its complement, and the data."""
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
    """A file that is read forwards; what was read too far can be put back."""

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
        """How many bytes were put back and not read again."""
        return len(self._back)

    def cut_off(self, what: str) -> DamagedError:
        """Return the error for a file that ends too early."""
        return DamagedError(f"{self.where} is cut off in the middle of a {what}", "use another copy of it")

    def damaged(self, why: object) -> DamagedError:
        """Return the error for a file that cannot be decompressed."""
        return DamagedError(f"{self.where} is damaged: {why}", "use another copy of it")


Task = Callable[[], bytes]


def decompressed(file: Readable, where: str, name: str | None = None) -> Iterator[bytes]:
    """Yield the content of a compressed file in pieces of at most `MAX_MEMBER` bytes. Threads decompress the members.

    `name` is the compression; with None, the first bytes of the file show it. `where` names the file in messages. If
    the file is cut off or damaged, raises `DamagedError` after the sound pieces before that place.
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

    `begins_file` is true for the first piece of the file, `begins_member` for the first piece of a member.
    """

    data: bytes
    begins_file: bool
    begins_member: bool


def sound_pieces(file: BinaryIO, where: str, name: str) -> Iterator[Sound]:
    """Yield what can be decompressed of a damaged file.

    After damage it continues at the next member that states its size, and ends if there is none. Raises `StorageError`
    if the file cannot be read, and `UsageError` if it needs lzop and there is none.
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
    """Yield the pieces of the next member; all pieces of the file if the compression has no members."""
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
    """Return the offset of the next header of a member that states its size, from `offset` on; -1 if there is none."""
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
    """Yield the tasks; a read error becomes a last task that raises it, so that the tasks before it are still done."""
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
    """Return the task that decompresses a member; `rest` is all that follows its header.

    The last bytes of `rest` are the CRC-32 and the size of the content. With the size, the buffer is allocated once; a
    buffer that grows takes a third more time.
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
    """Yield the content of one member that does not state its size, and put back what follows it."""
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
            if not 0 < size <= MAX_MEMBER:  # blockdiff writes no empty ones, and `decompress` does not check them
                raise source.damaged("a zstd frame has an impossible size")
            return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise source.damaged(error) from error

    return task


def _zstd_stream(source: _Input) -> Iterator[bytes]:
    """Yield the content of one frame that does not state its size, and put back what follows it.

    A few bytes of zstd may decompress to 128 KiB, and `decompressobj` has no limit for its output. So the input is cut
    into small pieces, and into smaller ones while the output is large.
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
