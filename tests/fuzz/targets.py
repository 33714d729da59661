"""What `make fuzz` and `tests/test_fuzz.py` feed with arbitrary bytes: each parser, and the errors that it promises.

A target passes over the errors of its parser's docstring and nothing else: whatever comes out of it is a fault. Parsers
behind a checksum get the bytes a second time with the checksum put right, or no mutation would ever be looked at.
"""

import functools
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from blockdiff import merge
from blockdiff.chain import generations
from blockdiff.check import verify
from blockdiff.database import optionfiles
from blockdiff.format import codec, deltafile, digesttable, manifest
from blockdiff.host import lvcheck, lvs, thin
from blockdiff.restore import salvage
from blockdiff.session import rules
from blockdiff.shared import errors, extents, wire
from blockdiff.shared.errors import (
    BlockdiffError,
    ConnectionLost,
    DamagedError,
    ProcessError,
    ProtocolError,
    SourceError,
    StorageError,
    UsageError,
)
from blockdiff.transport import address, knownhosts, publickey
from blockdiff.transport.advice import Place
from tests.fuzz import seeds
from tests.protocol import GOLDEN

#: Bytes that are taken of a decompressed file: a few hundred bytes may hold more than anybody has time for.
_ENOUGH = 32 << 20
_DIGEST_SIZE = 16
_NO_DIGEST = b"0" * 64
_CHECKSUM = re.compile(rb'"sha256": ?"([0-9a-f]{64})"')


@dataclass(frozen=True)
class Target:
    """A parser: what it does with bytes, the errors that it promises, and valid bytes to begin with."""

    parse: Callable[[bytes], object]
    promised: tuple[type[BlockdiffError], ...]
    seeds: Callable[[], Sequence[bytes]]

    def __call__(self, data: bytes) -> None:
        try:
            self.parse(data)
        except self.promised:
            pass


def _cut(data: bytes, step: int) -> Iterator[bytes]:
    return (data[i : i + step] for i in range(0, len(data), step))


def _runs(pieces: Iterator[bytes]) -> list[tuple[int, int, bytes | None]]:
    with deltafile.DeltaReader(pieces, "delta") as reader:
        found = []
        position = 0
        for run in reader.runs():
            assert run.offset >= position and run.length > 0, "runs overlap"
            assert run.data is None or len(run.data) == run.length
            position = run.offset + run.length
            found.append((run.offset, run.length, None if run.data is None else bytes(run.data)))
        assert reader.image_size is None or position <= reader.image_size
        return found


def _delta(data: bytes) -> None:
    """The runs do not depend on how the delta comes in pieces."""
    refused = None
    try:
        whole = _runs(iter([data]))
    except DamagedError as error:
        refused = error
    try:
        assert _runs(_cut(data, 5)) == whole
    except DamagedError:
        assert refused is not None
        raise


def _salvager(data: bytes) -> None:
    for delta_format in (1, 2):
        reader = deltafile.Salvager(512, delta_format)
        for number, piece in enumerate(_cut(data, 700)):
            for run in reader.runs(piece, number == 0, number in (0, 2)):
                assert run.length > 0 and run.offset + run.length <= 1 << 64
        for run in reader.last():
            assert run.data is not None and len(run.data) == run.length


def _joined(pieces: Iterator[bytes]) -> bytes:
    """Return what the pieces hold, up to the one that makes it enough."""
    parts = []
    left = _ENOUGH
    for piece in pieces:
        parts.append(piece)
        left -= len(piece)
        if left < 0:
            break
    return b"".join(parts)


def _decompress(data: bytes, name: str | None) -> bytes:
    def pieces() -> Iterator[bytes]:
        for piece in codec.decompressed(io.BytesIO(data), "delta", name):
            assert 0 < len(piece) <= codec.MAX_MEMBER
            yield piece

    return _joined(pieces())


def _sound(data: bytes, name: str) -> bytes:
    return _joined(piece.data for piece in codec.sound_pieces(io.BytesIO(data), "delta", name))


def _compressed(name: str) -> Callable[[bytes], None]:
    """What can be decompressed at all is sound."""

    def parse(data: bytes) -> None:
        sound = _sound(data, name)
        assert _decompress(data, name)[:_ENOUGH] == sound[:_ENOUGH]
        _decompress(data, None)

    return parse


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("fuzz")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd


def _table(data: bytes) -> None:
    with digesttable.TableReader(_memory_file(data), "table", _DIGEST_SIZE) as table:
        for first, count in ((0, 3000), (table.count // 2, 10), (table.count - 5, 100), (table.count, 1)):
            expected = max(0, min(count, table.count - first)) if first >= 0 else None
            found = table.digests(max(first, 0), count)
            assert expected is None or len(found) == expected * _DIGEST_SIZE
        assert len(table.sha256()) == 64


def sealed(content: bytes) -> bytes:
    """Return a manifest with the checksum that its other bytes have."""
    match = _CHECKSUM.search(content)
    if match is None:
        return content
    blank = content[: match.start(1)] + _NO_DIGEST + content[match.end(1) :]
    return blank.replace(_NO_DIGEST, hashlib.sha256(blank).hexdigest().encode(), 1)


def _manifest(data: bytes) -> None:
    """A manifest that is believed says the same when it is written and read again."""
    for content in (data, sealed(data)):
        refused = None
        try:
            found = manifest.from_bytes(content, "manifest")
            assert manifest.from_bytes(found.to_bytes(), "manifest") == found
        except DamagedError as error:
            refused = error
    if refused is not None:
        raise refused


@functools.cache
def _directory() -> "tempfile.TemporaryDirectory[str]":
    """Return a directory that is gone when the interpreter ends."""
    return tempfile.TemporaryDirectory()


def _chain_of(kind: str) -> str:
    """Return the NAME of a fresh copy of a golden chain."""
    place = Path(_directory().name) / kind
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for path in GOLDEN.glob(f"{kind}.[12v]*"):
        shutil.copyfile(path, place / path.name)
    return str(place / kind)


def _version(data: bytes) -> None:
    name = _chain_of("perl-plain")
    Path(name + ".ver").write_bytes(data)
    with generations.Chain(name) as found:
        assert found.version is None or 0 < found.version < 10**18
        assert found.last() == found.version
        list(found.spans(found.last()))


class _Nowhere:
    """A target for images of any size: it forgets them."""

    def write(self, offset: int, data: memoryview) -> None:
        assert offset >= 0 and len(data)

    def zero(self, offset: int, length: int) -> None:
        assert offset >= 0 and length > 0

    def finish(self, image_size: int) -> None:
        assert image_size >= 0


def _generation(data: bytes) -> None:
    """One file of a chain is anything: what reads all of it ends with a verdict or a typed error."""
    name = _chain_of("own-none")
    suffix, content = seeds.FILES[data[0] % len(seeds.FILES) if data else 0], data[1:]
    Path(name + suffix).write_bytes(sealed(content))
    with generations.Chain(name) as found, verify.Verifier(found) as verifier:
        list(verifier.all())
        for number in found.generations:
            try:
                salvage.salvage(found, number, _Nowhere())
            except (DamagedError, StorageError):
                pass
        merge.merge(found.needed(found.generation(2).number), _Nowhere())


class _Incoming(wire.Carrier):
    """A stream from memory that ends where the bytes do."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        return self._file.readinto(view)

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        raise AssertionError("nothing is answered")


def _no_crc(data: wire.Buffer, crc: int) -> int:
    return 0


def _frames(data: bytes) -> None:
    """The frames of an agent, as far as they come; their checksums count for nothing."""
    link = wire.Link(_Incoming(data), crc32=_no_crc)
    ruled = rules.Rules(1 << 20, 512, 1 << 15)
    while True:
        _take_frame(link, link.receive(), ruled)


def _take_frame(link: wire.Link, frame: wire.Frame, ruled: rules.Rules) -> None:
    if frame.kind == wire.DATA:
        link.read_bytes(frame, wire.MAX_PAYLOAD)
        ruled.check_run(frame.offset, frame.length, False)
    elif frame.kind == wire.ZERO:
        ruled.check_run(frame.offset, rules.LENGTH.unpack(link.read_bytes(frame, 8).ljust(8, b"\0"))[0], True)
    elif frame.kind == wire.PROGRESS:
        ruled.check_progress(frame.offset)
    elif frame.kind == wire.WANT:
        ruled.check_want(rules.LENGTH.unpack(link.read_bytes(frame, 8).ljust(8, b"\0"))[0], frame.offset)
    elif frame.kind == wire.LENT:
        rules.read_place(link.read_bytes(frame, wire.MAX_CONTROL))
    elif frame.kind in _CONTROL:
        _CONTROL[frame.kind](link.read_json(frame), ruled)
    else:
        link.read_bytes(frame, wire.MAX_PAYLOAD)


Fields = dict[str, object]
_CONTROL: dict[int, Callable[[Fields, rules.Rules], object]] = {
    wire.ERROR: lambda fields, ruled: errors.from_wire(fields, "host"),
    wire.READY: lambda fields, ruled: rules.check_ready(fields, 1, 1),
    wire.SOURCE: lambda fields, ruled: rules.check_source(fields),
    wire.TOTALS: lambda fields, ruled: ruled.check_totals(fields),
    wire.END: lambda fields, ruled: rules.notes(fields),
    wire.SNAPSHOTS: lambda fields, ruled: rules.check_leftovers(fields),
}


def _volumes(data: bytes) -> None:
    """What is known of a volume is text and numbers, and enough to decide whether a snapshot of it is possible."""
    for volume in lvs.parse_report(data):
        texts = [volume.uuid, volume.name, volume.group, volume.path, volume.dm_path, volume.segtype, volume.pool]
        texts += [volume.metadata, volume.origin, volume.origin_uuid, volume.attributes, volume.thin_id, *volume.tags]
        assert all(isinstance(text, str) for text in texts)
        if not volume.is_thin:
            lvcheck.check(volume, "", False)
            lvcheck.size_in_bytes("20%", volume)


def _thin_delta(data: bytes) -> None:
    """Whatever thin_delta says, extents cover the image, in order."""
    size = 1 << 20
    for meaning, gap in ((thin.CHANGED, extents.SAME), (thin.MAPPED, extents.ZEROS)):
        reader = thin.DeltaReader("2", "3")
        for piece in _cut(data, 100):
            reader.feed(piece)
        ranges = reader.end()
        covering = list(thin.covering(ranges, meaning, gap, size)) if meaning is thin.CHANGED else _mapped(ranges, size)
        for found in (covering, list(extents.aligned(covering, 65536, size))):
            ends = [0, *(extent.end for extent in found)]
            assert [extent.start for extent in found] == ends[:-1] and ends[-1] == size


def _mapped(ranges: list[thin.Range], size: int) -> list[extents.Extent]:
    return list(thin.covering([each for each in ranges if each[0] in thin.MAPPED], thin.MAPPED, extents.ZEROS, size))


def _options(data: bytes) -> None:
    path = Path(_directory().name) / "my.cnf"
    path.write_bytes(data)
    path.chmod(0o600)
    found = optionfiles.read(str(path), ["client", "client-mariadb"])
    assert all(isinstance(value, str | None) for value in found.values())


def _source(data: bytes) -> None:
    text = data.decode("utf-8", "surrogateescape")  # as words of a command line are
    try:
        address.parse_login(text)
    except UsageError:
        pass
    found = address.parse(text)
    assert found.path.startswith("/") and found.login.isprintable()


def _public_key(data: bytes) -> None:
    found = publickey.parse(data, "/nonexistent/key.pub")
    assert "\n" not in found and not found.startswith("#")
    assert found.split()[0] in publickey.parse(found.encode("utf-8"), "-")


def _known_hosts(data: bytes) -> None:
    path = Path(_directory().name) / "known_hosts"
    path.write_bytes(data)
    known = knownhosts.KnownKeys([str(path)], Place("web1", "web1", 2222))
    assert known.wrong("ssh-ed25519", b"never shown") is not None


TARGETS: dict[str, Target] = {
    "delta": Target(_delta, (DamagedError,), seeds.deltas),
    "salvager": Target(_salvager, (), seeds.deltas),
    "gzip": Target(_compressed("gzip"), (DamagedError,), seeds.gzip),
    "zstd": Target(_compressed("zstd"), (DamagedError,), seeds.zstd),
    "lzop": Target(_compressed("lzop"), (DamagedError,), seeds.lzop),
    "table": Target(_table, (DamagedError,), seeds.tables),
    "manifest": Target(_manifest, (DamagedError,), seeds.manifests),
    "version": Target(_version, (DamagedError,), seeds.versions),
    "generation": Target(_generation, (BlockdiffError,), seeds.generations),
    "frames": Target(_frames, (ProtocolError, ConnectionLost), seeds.frames),
    "lvs": Target(_volumes, (ProcessError, SourceError), seeds.reports),
    "thin_delta": Target(_thin_delta, (thin.HintError,), seeds.thin_deltas),
    "options": Target(_options, (UsageError,), seeds.options),
    "source": Target(_source, (UsageError,), seeds.sources),
    "publickey": Target(_public_key, (UsageError,), seeds.public_keys),
    "known_hosts": Target(_known_hosts, (), seeds.known_hosts),
}
