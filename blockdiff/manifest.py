"""The manifest of a generation: what it is, where it came from, and the checksums of its files.

A JSON object (`docs/format.md`) whose ``sha256`` is that of the file itself with the 64 digits replaced by zeros, so
that every byte of it is covered.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from blockdiff import coordinates
from blockdiff.coordinates import Coordinates
from blockdiff.errors import DamagedError

VERSION = 1
#: Largest manifest that is read, in bytes.
MAX_BYTES = 16 << 20

_NO_DIGEST = "0" * 64
Value = TypeVar("Value")


@dataclass(frozen=True)
class Parent:
    """The generation that this one builds on; `manifest_sha256` is None where it has no manifest."""

    generation: int
    manifest_sha256: str | None


@dataclass(frozen=True)
class StoredFile:
    """A file of a generation: the `suffix` that follows ``NAME.N``, size in bytes, and SHA-256."""

    suffix: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """What was backed up.

    `host` (with ``:port`` where one was given) is None for this machine; `kind` is ``file``, ``device`` or ``command``.
    `volume` is the LV UUID of a logical volume that was read through a snapshot.
    """

    host: str | None
    path: str
    kind: str
    volume: str | None = None

    def __str__(self) -> str:
        return self.path if self.host is None else f"{self.host}:{self.path}"

    def same_place(self, other: "Source") -> bool:
        """Return whether both name the same place; a regular file may have become a device there."""
        return (self.host, self.path) == (other.host, other.path)


@dataclass(frozen=True)
class Snapshot:
    """The snapshot that was read: its LV UUID, and whether it was ``thick`` or ``thin``.

    `took_s` is how long its making took, with the commands around it and the other snapshots of the same run;
    `fill_percent` the highest fill level seen (thick), `extents` says how the extents were known that were read:
    ``mapped`` or ``changed`` (that alone was read), ``audited`` (all was read and held against them), None (all was).
    """

    uuid: str
    kind: str
    took_s: float
    fill_percent: float | None = None
    kept: bool = False
    extents: str | None = None


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
    snapshot: Snapshot | None = None
    quiesced: Quiesced | None = None
    database: Coordinates | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        fields = {"blockdiff_manifest": VERSION, "sha256": _NO_DIGEST, **asdict(self)}
        blank = json.dumps(fields, indent=1, ensure_ascii=True).encode("ascii") + b"\n"
        digest = hashlib.sha256(blank).hexdigest().encode("ascii")
        return blank.replace(_NO_DIGEST.encode("ascii"), digest, 1)


def from_bytes(content: bytes, path: str) -> Manifest:
    """Return the manifest in `content`; raises `DamagedError` where it is not what was written."""
    try:
        fields = json.loads(content.decode("ascii"))
        claimed = str(fields["sha256"])
        version = int(fields["blockdiff_manifest"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"{path} is not a manifest", "restore it from a copy, or move it away") from error
    if version != VERSION:
        raise DamagedError(f"{path} has manifest version {version}, this blockdiff knows {VERSION}", "use a newer one")
    blank = content.replace(claimed.encode("ascii", "replace"), _NO_DIGEST.encode("ascii"), 1)
    if hashlib.sha256(blank).hexdigest() != claimed:
        raise DamagedError(f"{path} is damaged: its checksum does not match", "restore it from a copy")
    return _from_fields(fields, path)


def _from_fields(fields: dict[str, object], path: str) -> Manifest:
    def get(holder: object, name: str, kind: type[Value]) -> Value:
        value = holder.get(name) if isinstance(holder, dict) else None
        if not isinstance(value, kind) or (kind is int and (isinstance(value, bool) or int(str(value)) < 0)):
            raise DamagedError(f"{path} is damaged: {name} is missing or unfit")
        return value

    def optional(holder: object, name: str, kind: type[Value]) -> Value | None:
        return None if not isinstance(holder, dict) or holder.get(name) is None else get(holder, name, kind)

    def stored(name: str) -> StoredFile:
        holder = fields.get(name)
        return StoredFile(get(holder, "suffix", str), get(holder, "size", int), get(holder, "sha256", str))

    def seconds(holder: object, name: str) -> float:
        value = holder.get(name) if isinstance(holder, dict) else None
        return value if isinstance(value, float) and 0 <= value < math.inf else float(get(holder, name, int))

    def snapshot() -> Snapshot | None:
        holder = optional(fields, "snapshot", dict)
        return (
            None
            if holder is None
            else Snapshot(
                get(holder, "uuid", str),
                get(holder, "kind", str),
                seconds(holder, "took_s"),
                seconds(holder, "fill_percent") if holder.get("fill_percent") is not None else None,
                get(holder, "kept", bool),
                optional(holder, "extents", str),
            )
        )

    def quiesced() -> Quiesced | None:
        holder = optional(fields, "quiesced", dict)
        return (
            None
            if holder is None
            else Quiesced(
                get(holder, "by", str),
                seconds(holder, "held_s"),
                [str(statement) for statement in get(holder, "statements", list)],
                seconds(holder, "waited_s") if holder.get("waited_s") is not None else None,
            )
        )

    def database() -> Coordinates | None:
        holder = optional(fields, "database", dict)
        try:
            return None if holder is None else coordinates.from_fields(holder)
        except ValueError as error:
            raise DamagedError(f"{path} is damaged: {error} is missing or unfit") from error

    parent = fields.get("parent")
    source = fields.get("source")
    return Manifest(
        chain=get(fields, "chain", str),
        generation=get(fields, "generation", int),
        parent=Parent(get(parent, "generation", int), optional(parent, "manifest_sha256", str)) if parent else None,
        full=get(fields, "full", bool),
        delta_format=get(fields, "delta_format", int),
        delta=stored("delta"),
        table=stored("table"),
        digest=get(fields, "digest", str),
        block_size=get(fields, "block_size", int),
        image_size=optional(fields, "image_size", int),
        blocks=get(fields, "blocks", int),
        changed_blocks=get(fields, "changed_blocks", int),
        source=Source(
            optional(source, "host", str),
            get(source, "path", str),
            get(source, "kind", str),
            optional(source, "volume", str),
        ),
        consistency=get(fields, "consistency", str),
        started=get(fields, "started", str),
        finished=get(fields, "finished", str),
        bytes_read=optional(fields, "bytes_read", int),
        bytes_received=optional(fields, "bytes_received", int),
        run=optional(fields, "run", str),
        snapshot=snapshot(),
        quiesced=quiesced(),
        database=database(),
        notes=[str(note) for note in optional(fields, "notes", list) or []],
        versions={str(k): str(v) for k, v in get(fields, "versions", dict).items()},
    )


def sha256(content: bytes) -> str:
    """Return the checksum of a manifest file by which its child knows it, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
