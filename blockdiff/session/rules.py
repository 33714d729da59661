"""The rules for what an agent may report: everything that breaks them is refused.

The host is trusted for the content of its own volume and for nothing else (`docs/architecture.md`).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from blockdiff.chain import clock
from blockdiff.shared import runs, wire
from blockdiff.shared.blocks import MAX_BLOCK_SIZE, MAX_IMAGE_SIZE, block_count
from blockdiff.shared.errors import ProtocolError, printable

LENGTH = struct.Struct("<Q")
PLACE = struct.Struct("<QQ")
_KINDS = ("file", "device")
_NOTES = 100


@dataclass(frozen=True)
class Totals:
    """What the agent reports at the end of a source.

    `read` is in bytes. `touched` says whether the source was written to while it was read (None: unknown), and `how`
    says how, or how it was in use (see `witness.Seen`). `fill_percent` is the highest fill level of the snapshot;
    `kept` means that it stays on the host, and `left` that it could not be removed.
    """

    read: int
    touched: bool | None
    fill_percent: float | None = None
    kept: bool = False
    left: bool = False
    notes: tuple[str, ...] = ()
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A snapshot of ours on a host: its name for LVM's commands, its size in bytes, and when it was made (UTC).

    `volume` is the name of its volume, None if that no longer exists; `chain` is the chain for which it was made
    (``SERVER:/path``, None if unknown); `state` is one of `wire.RUNNING`, `wire.KEPT` and `wire.DEAD`.
    """

    name: str
    volume: str | None
    chain: str | None
    state: str
    open: bool
    size: int
    made: str | None


@dataclass(frozen=True)
class Volume:
    """What the agent reports about a logical volume; both are None for a source that is read as it is."""

    uuid: str | None
    segtype: str | None


@dataclass(frozen=True)
class Outside:
    """A place to which a data directory leads, on another device; `source` is the source beneath it, None for none."""

    path: str
    device: str
    source: int | None
    volume: str


@dataclass(frozen=True)
class Ready:
    """What the agent found before anything was stopped.

    `places` has, for each directory in the request, the number of the device that it is on (``""``: no such directory),
    and which of the sources is beneath that device (None: none of them). `devices` has the paths of the devices without
    a source beneath. `outside` are the places on other devices to which the data directory leads. `unlogged` says
    whether there are tables whose engines cannot roll back (None: unknown). `left` are our snapshots in the volume
    groups of the sources.
    """

    volumes: list[Volume]
    places: list[tuple[str, int | None]]
    notes: tuple[str, ...]
    devices: Mapping[str, str] = field(default_factory=dict)
    outside: tuple[Outside, ...] = ()
    unlogged: bool | None = None
    left: tuple[Left, ...] = ()


@dataclass(frozen=True)
class Opened:
    """The opened source: size in bytes, kind, and for a snapshot its path, LV UUID, and how its extents are known."""

    size: int
    kind: str
    path: str
    snapshot: str | None
    extents: str | None


@dataclass(frozen=True)
class Leftovers:
    """Our snapshots on a host, the names of those that were removed, and why others could not be removed."""

    found: tuple[Left, ...]
    removed: tuple[str, ...]
    failures: tuple[str, ...]


class Rules:
    """The rules for what an agent may send. Raises `ProtocolError`."""

    def __init__(self, image_size: int, block_size: int, table_size: int) -> None:
        self._image_size = image_size
        self._block_size = block_size
        self._table_size = table_size
        self._position = 0
        self._progress = 0
        self._wanted = 0
        self._changed_blocks = 0

    def check_run(self, offset: int, length: int, is_zero: bool) -> None:
        """Check that a run has whole blocks within the image, and comes after all runs before it."""
        stop = offset + length
        if offset < self._position or not length or stop > self._image_size:
            raise ProtocolError(f"sent {length} bytes at offset {offset} of {self._image_size}, after {self._position}")
        if offset % self._block_size or (stop % self._block_size and stop != self._image_size):
            raise ProtocolError(f"sent {length} bytes at offset {offset}, which are not whole blocks")
        blocks = block_count(length, self._block_size)
        if not is_zero and blocks > runs.BATCH_BLOCKS:
            raise ProtocolError(f"sent {blocks} blocks at once")
        self._position = stop
        self._changed_blocks += blocks

    def check_progress(self, offset: int) -> None:
        """Check that progress increases each time, at most to the image's end: so the number of frames is limited."""
        if not self._progress < offset <= self._image_size:
            raise ProtocolError(f"reported progress to offset {offset} of {self._image_size}, after {self._progress}")
        self._progress = offset

    def check_want(self, start: int, offset: int) -> None:
        """Check that the agent asks for more of the digest table each time, and not for much more than it has.

        So the number of frames is limited.
        """
        if not self._wanted < offset <= self._table_size + wire.TABLE_WINDOW or start > offset:
            raise ProtocolError(f"asks for {start} to {offset} of {self._table_size} bytes of digests")
        self._wanted = offset

    def check_totals(self, fields: dict[str, object]) -> Totals:
        """Check that the totals match what was received, and that the whole image was examined; return them."""
        image_size, changed_blocks, read = wire.integers(fields, "image_size", "changed_blocks", "read")
        if (image_size, changed_blocks) != (self._image_size, self._changed_blocks):
            raise ProtocolError(f"counts {changed_blocks} blocks of {image_size} bytes, {self._changed_blocks} came")
        if self._progress != self._image_size or read > self._image_size:
            raise ProtocolError(f"stopped at offset {self._progress} of {self._image_size}")
        touched, how, level = fields.get("touched"), fields.get("how"), fields.get("level_permille")
        return Totals(
            read,
            touched if isinstance(touched, bool) else None,
            wire.integers(fields, "level_permille")[0] / 10 if level is not None else None,
            fields.get("kept") is True,
            fields.get("left") is True,
            notes(fields),
            printable(how, 500) if isinstance(how, str) else "",
        )


def read_place(payload: bytes) -> tuple[int, int]:
    """Return the place and the length that a LENT frame carries; the length may be at most that of a DATA frame."""
    if len(payload) != PLACE.size:
        raise ProtocolError(f"sent a place of {len(payload)} bytes")
    place, length = PLACE.unpack(payload)
    if length > wire.MAX_PAYLOAD:
        raise ProtocolError(f"sent {length} bytes at once")
    return place, length


def check_source(fields: dict[str, object]) -> Opened:
    """Return what the agent reports about a source that it opened."""
    (size,) = wire.integers(fields, "size")
    kind = wire.text(fields, "kind")
    if not 0 < size <= MAX_IMAGE_SIZE - MAX_BLOCK_SIZE or kind not in _KINDS:
        raise ProtocolError(f"claims a {printable(kind, 20)} of {size} bytes")
    extents = _word(fields, "extents") or None
    if extents not in (None, "mapped", "changed", "audited"):
        raise ProtocolError("knows extents in an unknown way")
    return Opened(size, kind, _word(fields, "path") or "", _word(fields, "snapshot"), extents)


def check_ready(fields: dict[str, object], sources: int, directories: int) -> Ready:
    """Return what the agent found before anything was stopped."""
    volumes, places = fields.get("sources"), fields.get("directories")
    if not isinstance(volumes, list) or len(volumes) != sources:
        raise ProtocolError(f"prepared something else than {sources} sources")
    if not isinstance(places, list) or len(places) != directories:
        raise ProtocolError(f"located something else than {directories} directories")
    unlogged = fields.get("unlogged")
    return Ready(
        [_volume(each) for each in volumes],
        [_place(each, sources) for each in places],
        notes(fields),
        _devices(fields.get("volumes", {})),
        _outside(fields.get("outside", []), sources),
        unlogged if isinstance(unlogged, bool) else None,
        _lefts(fields.get("left", [])),
    )


def _devices(found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(path, str) for path in found.values()):
        raise ProtocolError("says nothing of a device")
    return {printable(number, 40): printable(path, 300) for number, path in found.items()}


def _outside(found: object, sources: int) -> tuple[Outside, ...]:
    if not isinstance(found, list) or len(found) > wire.MAX_OUTSIDE:
        raise ProtocolError("says nothing of what the database keeps elsewhere")
    places = []
    for each in found:
        if not (isinstance(each, list) and len(each) == 4 and isinstance(each[0], str) and isinstance(each[3], str)):
            raise ProtocolError("says nothing of what the database keeps elsewhere")
        places.append(Outside(printable(each[0], 500), *_place(each[1:3], sources), printable(each[3], 300)))
    return tuple(places)


def check_leftovers(fields: dict[str, object]) -> Leftovers:
    """Return what the agent reports about our snapshots on the host, and about those that it was to remove."""
    found = _lefts(fields.get("snapshots"))
    return Leftovers(found, _texts(fields, "removed"), _texts(fields, "failures"))


def _lefts(found: object) -> tuple[Left, ...]:
    if not isinstance(found, list):
        raise ProtocolError("says nothing of its snapshots")
    return tuple(_left(each) for each in found)


def _left(fields: object) -> Left:
    if not isinstance(fields, dict):
        raise ProtocolError("says nothing of a snapshot")
    words = ("name", "origin", "chain", "state", "made")
    name, origin, chain, state, made = (printable(wire.text(fields, word), 300) for word in words)
    if state not in (wire.RUNNING, wire.KEPT, wire.DEAD):
        raise ProtocolError("has a snapshot in an unknown state")
    (size,) = wire.integers(fields, "size")
    seconds = clock.seconds(made)
    when = None if seconds is None else clock.iso(seconds)
    return Left(name, origin or None, chain or None, state, fields.get("open") is True, size, when)


def _volume(fields: object) -> Volume:
    if not isinstance(fields, dict):
        raise ProtocolError("says nothing of a source")
    return Volume(_word(fields, "uuid"), _word(fields, "segtype"))


def _place(fields: object, sources: int) -> tuple[str, int | None]:
    if isinstance(fields, list) and len(fields) == 2:
        device, index = fields
        if isinstance(device, str) and (index is None or (isinstance(index, int) and 0 <= index < sources)):
            return printable(device, 40), index
    raise ProtocolError("says nothing of a directory")


def _word(fields: dict[str, object], name: str) -> str | None:
    """Return a short text from the agent, such as an LV UUID; None if there is none."""
    value = fields.get(name)
    return printable(value, 100) if isinstance(value, str) else None


def notes(fields: dict[str, object]) -> tuple[str, ...]:
    """Return the agent's notes, safe for a terminal."""
    return _texts(fields, "notes")[:_NOTES]


def _texts(fields: dict[str, object], name: str) -> tuple[str, ...]:
    return tuple(printable(text) for text in wire.texts(fields, name))
