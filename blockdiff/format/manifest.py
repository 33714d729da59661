"""The manifest of a generation: what the generation is, what its source was, and the checksums of its files.

It is a JSON object (`docs/format.md`). Its ``sha256`` is that of the file itself with these 64 digits replaced by
zeros, so that it covers every byte of the file.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from blockdiff.database import coordinates
from blockdiff.database.coordinates import Coordinates
from blockdiff.format import checksum, codec
from blockdiff.shared.blocks import DIGEST_SIZES, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE, block_count
from blockdiff.shared.errors import ChainError, DamagedError
from blockdiff.shared.fields import Fields

#: The version that is written. Version 1, in which a file has ``sha256`` instead of ``checksum``, is read as well.
VERSION = 2
#: Largest manifest that is read, in bytes.
MAX_BYTES = 16 << 20

_NO_DIGEST = "0" * 64
Value = TypeVar("Value")


@dataclass(frozen=True)
class Parent:
    """The generation that this one builds on; `manifest_sha256` is None if that has no manifest."""

    generation: int
    manifest_sha256: str | None


@dataclass(frozen=True)
class StoredFile:
    """A file of a generation: the `suffix` after ``NAME.N``, the size in bytes, and a checksum (`checksum.py`)."""

    suffix: str
    size: int
    checksum: str


@dataclass(frozen=True)
class Source:
    """What was backed up.

    `host` (with ``:port`` if one was given) is None for this machine; `kind` is ``file``, ``device`` or ``command``.
    `volume` is the LV UUID of a logical volume that was read through a snapshot. `was` is the name of the source when
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
        """Return whether both have the same host and path; a regular file may have become a device."""
        return (self.host, self.path) == (other.host, other.path)


@dataclass(frozen=True)
class SnapshotRecord:
    """The snapshot that was read: its LV UUID, and whether it was ``thick`` or ``thin``.

    `took_s` is how many seconds it took to make the snapshot, with the commands before and after it and the other
    snapshots of the same run. `fill_percent` is the highest fill level seen (thick). `extents` says what was read: only
    the ``mapped`` or the ``changed`` extents; everything, to check the list of changed extents (``audited``); or simply
    everything (None). The snapshots of one run were made within `apart_s` seconds; None if it made only one.
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
    """What stopped writers, and for how long: `by` is ``mysql``, ``command`` (LVCREATE_PREFIX) or ``freeze``.

    `waited_s` is how long it took to get the lock of a database; None for the others.
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
        """How many bytes of the image are in the delta."""
        carried = self.changed_blocks * self.block_size
        return carried if self.image_size is None else min(carried, self.image_size)

    def to_bytes(self) -> bytes:
        """Return the file's content. Raises `ChainError` if `from_bytes` would refuse it or read it differently."""
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
    """Return the manifest in `content`; raises `DamagedError` if it is not as it was written, or not a manifest."""
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
    given = Fields(fields, lambda name: DamagedError(f"{path} is damaged: {name} is missing or not valid"))
    known = _known(given)
    _check(given, known)
    return known


def _check(fields: Fields, known: Manifest) -> None:
    """Check the values that later steps calculate with: the checksum does not show who wrote the manifest."""
    fields.check("delta_format", known.delta_format in (1, 2))
    fields.check("block_size", MIN_BLOCK_SIZE <= known.block_size <= MAX_BLOCK_SIZE)
    fields.check("digest", known.digest in DIGEST_SIZES)
    fields.check("suffix", known.delta.suffix in codec.SUFFIXES.values() and known.table.suffix == "." + known.digest)
    fields.check("checksum", checksum.algorithm(known.delta.checksum) is not None)
    fields.check("checksum", checksum.algorithm(known.table.checksum) == checksum.OF_OTHERS)
    fields.check("blocks", known.image_size is None or known.blocks == block_count(known.image_size, known.block_size))


def _known(fields: Fields) -> Manifest:
    return Manifest(
        chain=fields.text("chain"),
        generation=fields.count("generation"),
        parent=_optional(_parent, fields, "parent"),
        full=fields.flag("full"),
        delta_format=fields.count("delta_format"),
        delta=_stored(fields.part("delta")),
        table=_stored(fields.part("table")),
        digest=fields.text("digest"),
        block_size=fields.count("block_size"),
        image_size=fields.optional(fields.count, "image_size"),
        blocks=fields.count("blocks"),
        changed_blocks=fields.count("changed_blocks"),
        source=_source(fields.part("source")),
        consistency=fields.text("consistency"),
        started=fields.text("started"),
        finished=fields.text("finished"),
        bytes_read=fields.optional(fields.count, "bytes_read"),
        bytes_received=fields.optional(fields.count, "bytes_received"),
        run=fields.optional(fields.text, "run"),
        snapshot=_optional(_snapshot, fields, "snapshot"),
        quiesced=_optional(_quiesced, fields, "quiesced"),
        database=_optional(coordinates.from_fields, fields, "database"),
        notes=fields.optional(fields.texts, "notes") or [],
        versions=_texts_by_name(fields.part("versions")),
    )


def _optional(read: Callable[[Fields], Value], fields: Fields, name: str) -> Value | None:
    return read(fields.part(name)) if fields.has(name) else None


def _texts_by_name(fields: Fields) -> dict[str, str]:
    return {name: fields.text(name) for name in fields.names()}


def _parent(fields: Fields) -> Parent:
    return Parent(fields.count("generation"), fields.optional(fields.text, "manifest_sha256"))


def _stored(fields: Fields) -> StoredFile:
    of_version_1 = fields.optional(fields.text, "sha256")
    known = fields.text("checksum") if of_version_1 is None else checksum.of_sha256(of_version_1)
    return StoredFile(fields.text("suffix"), fields.count("size"), known)


def _source(fields: Fields) -> Source:
    host, volume, was = (fields.optional(fields.text, name) for name in ("host", "volume", "was"))
    return Source(host, fields.text("path"), fields.text("kind"), volume, was)


def _snapshot(fields: Fields) -> SnapshotRecord:
    return SnapshotRecord(
        fields.text("uuid"),
        fields.text("kind"),
        fields.number("took_s"),
        fields.optional(fields.number, "fill_percent"),
        fields.flag("kept"),
        fields.optional(fields.text, "extents"),
        fields.optional(fields.number, "apart_s"),
    )


def _quiesced(fields: Fields) -> Quiesced:
    return Quiesced(
        fields.text("by"),
        fields.number("held_s"),
        fields.texts("statements"),
        fields.optional(fields.number, "waited_s"),
    )


def sha256(content: bytes) -> str:
    """Return the SHA-256 of a manifest file, in hexadecimal: the next generation's manifest contains it."""
    return hashlib.sha256(content).hexdigest()
