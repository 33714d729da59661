"""The manifest of a generation: what it is, where it came from, and the checksums of its files.

A JSON object (`docs/format.md`) whose ``sha256`` is that of the file itself with the 64 digits replaced by zeros, so
that every byte of it is covered.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from blockdiff.database import coordinates
from blockdiff.database.coordinates import Coordinates
from blockdiff.format import checksum, codec
from blockdiff.shared.blocks import DIGEST_SIZES, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, block_count
from blockdiff.shared.errors import ChainError, DamagedError

#: What is written. Version 1, in which a file had its SHA-256 in place of a checksum with a name, is read as well.
VERSION = 2
#: Largest whole number in one: more than anything there is to count, and a float can hold it.
MAX_INTEGER = (1 << 63) - 1
#: Largest manifest that is read, in bytes.
MAX_BYTES = 16 << 20

_NO_DIGEST = "0" * 64
Value = TypeVar("Value")


@dataclass(frozen=True)
class Parent:
    """The generation that this one builds on; `manifest_sha256` is None if it has no manifest."""

    generation: int
    manifest_sha256: str | None


@dataclass(frozen=True)
class StoredFile:
    """A file of a generation: the `suffix` that follows ``NAME.N``, size in bytes, and `checksum` (see there)."""

    suffix: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Source:
    """What was backed up.

    `host` (with ``:port`` if one was given) is None for this machine; `kind` is ``file``, ``device`` or ``command``.
    `volume` is the LV UUID of a logical volume that was read through a snapshot, `was` how the source was called when
    the generation was made, if `blockdiff repair --source` has given it another name since.
    """

    host: str | None
    path: str
    kind: str
    volume: str | None = None
    was: str | None = None

    def __str__(self) -> str:
        return self.path if self.host is None else f"{self.host}:{self.path}"

    def same_place(self, other: "Source") -> bool:
        """Return whether both name the same place; a regular file may have become a device there."""
        return (self.host, self.path) == (other.host, other.path)


@dataclass(frozen=True)
class SnapshotRecord:
    """The snapshot that was read: its LV UUID, and whether it was ``thick`` or ``thin``.

    `took_s` is how long its making took, with the commands around it and the other snapshots of the same run;
    `fill_percent` the highest fill level seen (thick), `extents` says how the extents were known that were read:
    ``mapped`` or ``changed`` (that alone was read), ``audited`` (all was read and compared with them), None (all was).
    `apart_s` is how many seconds lay between the snapshots of a run at most, None if it had one.
    """

    uuid: str
    kind: str
    took_s: float
    fill_percent: float | None = None
    kept: bool = False
    extents: str | None = None
    apart_s: float | None = None


@dataclass(frozen=True)
class Quiesced:
    """What held writers still, and for how long: `by` is ``mysql``, ``command`` (LVCREATE_PREFIX) or ``freeze``.

    `waited_s` is how long it took to get hold, of a database.
    """

    by: str
    held_s: float
    statements: list[str] = field(default_factory=list)
    waited_s: float | None = None


@dataclass(frozen=True)
class Manifest:
    """See `docs/format.md` for each field. Times are ISO 8601 in UTC, sizes in bytes."""

    chain: str
    generation: int
    parent: Parent | None
    full: bool
    delta_format: int
    delta: StoredFile
    table: StoredFile
    digest: str
    block_size: int
    image_size: int | None
    blocks: int
    changed_blocks: int
    source: Source
    consistency: str
    started: str
    finished: str
    bytes_read: int | None = None
    bytes_received: int | None = None
    run: str | None = None
    snapshot: SnapshotRecord | None = None
    quiesced: Quiesced | None = None
    database: Coordinates | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def changed_bytes(self) -> int:
        """How many bytes of the image the delta carries."""
        carried = self.changed_blocks * self.block_size
        return carried if self.image_size is None else min(carried, self.image_size)

    def to_bytes(self) -> bytes:
        """Return the file's content. Raises `ChainError` for what `from_bytes` would not read as it is."""
        fields = {"blockdiff_manifest": VERSION, "sha256": _NO_DIGEST, **asdict(self)}
        blank = json.dumps(fields, indent=1, ensure_ascii=True).encode("ascii") + b"\n"
        digest = hashlib.sha256(blank).hexdigest().encode("ascii")
        content = blank.replace(_NO_DIGEST.encode("ascii"), digest, 1)
        self._check_readable(content)
        return content

    def _check_readable(self, content: bytes) -> None:
        unreadable = f"the manifest of generation {self.generation} could not be read again"
        if len(content) > MAX_BYTES:
            raise ChainError(f"{unreadable}: it has {len(content)} bytes, {MAX_BYTES} at most are read")
        try:
            same = from_bytes(content, "it") == self
        except DamagedError as error:
            raise ChainError(f"{unreadable}: {error.message}") from error
        if not same:
            raise ChainError(f"{unreadable}: it would be read differently")


def from_bytes(content: bytes, path: str) -> Manifest:
    """Return the manifest in `content`; raises `DamagedError` if it is not what was written."""
    try:
        fields = json.loads(content.decode("ascii"))
        claimed = str(fields["sha256"])
        version = int(fields["blockdiff_manifest"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{path} is not a manifest", "restore it from a copy, or move it away") from error
    if not 1 <= version <= VERSION:
        raise DamagedError(
            f"{path} has manifest version {version}, this blockdiff knows 1 to {VERSION}", "use a newer one"
        )
    blank = content.replace(claimed.encode("ascii", "replace"), _NO_DIGEST.encode("ascii"), 1)
    if hashlib.sha256(blank).hexdigest() != claimed:
        raise DamagedError(f"{path} is damaged: its checksum does not match", "restore it from a copy")
    return _from_fields(fields, path)


class _Fields:
    """An object of a manifest, whatever the file holds in its place; `path` is for messages.

    All of it raises `DamagedError` for what is missing or of another type.
    """

    def __init__(self, holder: object, path: str) -> None:
        self._holder = holder if isinstance(holder, dict) else {}
        self._path = path

    def get(self, name: str, kind: type[Value]) -> Value:
        """Return a field; a number is whole, from 0 to `MAX_INTEGER`."""
        value = self._holder.get(name)
        if not isinstance(value, kind) or (kind is int and not _is_count(value)):
            raise self.unfit(name)
        return value

    def check(self, name: str, fits: bool) -> None:
        """Raise the error for a field that `fits` not with the others."""
        if not fits:
            raise self.unfit(name)

    def unfit(self, name: str) -> DamagedError:
        """Return the error for a field."""
        return DamagedError(f"{self._path} is damaged: {name} is missing or not valid")

    def optional(self, name: str, kind: type[Value]) -> Value | None:
        """Return a field that may be ``null`` or missing."""
        return None if self._holder.get(name) is None else self.get(name, kind)

    def number(self, name: str) -> float:
        """Return a number that need not be whole."""
        value = self._holder.get(name)
        return value if isinstance(value, float) and 0 <= value < math.inf else float(self.get(name, int))

    def optional_number(self, name: str) -> float | None:
        """Return a number that need not be whole, and may be ``null`` or missing."""
        return None if self._holder.get(name) is None else self.number(name)

    def part(self, name: str) -> "_Fields":
        """Return an object in this one."""
        return _Fields(self._holder.get(name), self._path)

    def optional_part(self, name: str) -> "_Fields | None":
        """Return an object in this one that may be ``null`` or missing."""
        return None if self.optional(name, dict) is None else self.part(name)

    def coordinates(self, name: str) -> Coordinates | None:
        """Return a database's place, which may be ``null`` or missing."""
        holder = self.optional(name, dict)
        try:
            return None if holder is None else coordinates.from_fields(holder)
        except ValueError as error:
            raise DamagedError(f"{self._path} is damaged: {error} is missing or not valid") from error


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_INTEGER


def _from_fields(found: dict[str, object], path: str) -> Manifest:
    fields = _Fields(found, path)
    known = _known(fields)
    _check(fields, known)
    return known


def _check(fields: _Fields, known: Manifest) -> None:
    """What later steps calculate with must make sense: a checksum does not say who wrote a manifest."""
    fields.check("delta_format", known.delta_format in (1, 2))
    fields.check("block_size", MIN_BLOCK_SIZE <= known.block_size <= MAX_BLOCK_SIZE)
    fields.check("digest", known.digest in DIGEST_SIZES)
    fields.check("suffix", known.delta.suffix in codec.SUFFIXES.values() and known.table.suffix == "." + known.digest)
    fields.check("checksum", checksum.algorithm(known.delta.checksum) is not None)
    fields.check("checksum", checksum.algorithm(known.table.checksum) == checksum.OF_OTHERS)
    fields.check("blocks", known.image_size is None or known.blocks == block_count(known.image_size, known.block_size))


def _known(fields: _Fields) -> Manifest:
    return Manifest(
        chain=fields.get("chain", str),
        generation=fields.get("generation", int),
        parent=_parent(fields.optional_part("parent")),
        full=fields.get("full", bool),
        delta_format=fields.get("delta_format", int),
        delta=_stored(fields.part("delta")),
        table=_stored(fields.part("table")),
        digest=fields.get("digest", str),
        block_size=fields.get("block_size", int),
        image_size=fields.optional("image_size", int),
        blocks=fields.get("blocks", int),
        changed_blocks=fields.get("changed_blocks", int),
        source=_source(fields.part("source")),
        consistency=fields.get("consistency", str),
        started=fields.get("started", str),
        finished=fields.get("finished", str),
        bytes_read=fields.optional("bytes_read", int),
        bytes_received=fields.optional("bytes_received", int),
        run=fields.optional("run", str),
        snapshot=_snapshot(fields.optional_part("snapshot")),
        quiesced=_quiesced(fields.optional_part("quiesced")),
        database=fields.coordinates("database"),
        notes=[str(note) for note in fields.optional("notes", list) or []],
        versions={str(k): str(v) for k, v in fields.get("versions", dict).items()},
    )


def _parent(fields: _Fields | None) -> Parent | None:
    return None if fields is None else Parent(fields.get("generation", int), fields.optional("manifest_sha256", str))


def _stored(fields: _Fields) -> StoredFile:
    of_version_1 = fields.optional("sha256", str)
    known = fields.get("checksum", str) if of_version_1 is None else checksum.of_sha256(of_version_1)
    return StoredFile(fields.get("suffix", str), fields.get("size", int), known)


def _source(fields: _Fields) -> Source:
    host, volume = fields.optional("host", str), fields.optional("volume", str)
    return Source(host, fields.get("path", str), fields.get("kind", str), volume, fields.optional("was", str))


def _snapshot(fields: _Fields | None) -> SnapshotRecord | None:
    if fields is None:
        return None
    return SnapshotRecord(
        fields.get("uuid", str),
        fields.get("kind", str),
        fields.number("took_s"),
        fields.optional_number("fill_percent"),
        fields.get("kept", bool),
        fields.optional("extents", str),
        fields.optional_number("apart_s"),
    )


def _quiesced(fields: _Fields | None) -> Quiesced | None:
    if fields is None:
        return None
    return Quiesced(
        fields.get("by", str),
        fields.number("held_s"),
        [str(statement) for statement in fields.get("statements", list)],
        fields.optional_number("waited_s"),
    )


def sha256(content: bytes) -> str:
    """Return the checksum of a manifest file by which its child knows it, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
