"""Which parts of a thin volume changed, and which are mapped: read from the metadata of its pool, not from the volume.

Shipped to the host: standard library only, Python 3.6 or newer.

`thin_delta` compares two snapshots in one pool through a metadata snapshot, which is reserved only for that time. LVM
uses thin ids again, so a kept snapshot is identified by its LV UUID. Anything unexpected raises a `HintError`, and then
the run reads the whole volume.
"""

import os
import re
import threading
from typing import Callable, Dict, Iterator, List, Optional, Tuple
from xml.parsers import expat

from blockdiff.host import lvs
from blockdiff.host.lvs import Volume
from blockdiff.lvm import KEPT_TAG
from blockdiff.shared import process, signals
from blockdiff.shared.errors import BlockdiffError, ProcessError, printable
from blockdiff.shared.extents import DATA, SAME, ZEROS, Extent

#: How long thin_delta, and a message to the device mapper, may take, in seconds.
DELTA_TIMEOUT_S = 300.0
MESSAGE_TIMEOUT_S = 30.0
#: How many ranges are accepted from thin_delta; if there are more, it is as good to read everything.
RANGE_LIMIT = 200000

_SECTOR = 512
_UUID = re.compile(r"[0-9A-Za-z]{6}(-[0-9A-Za-z]{4}){5}-[0-9A-Za-z]{6}")
_NUMBER = re.compile(r"[0-9]{1,18}")

#: What the kinds of ranges mean that thin_delta reports. A range that it does not report is mapped in neither snapshot.
CHANGED = {"same": SAME, "different": DATA, "right_only": DATA, "left_only": ZEROS}
MAPPED = {"same": DATA}


class HintError(BlockdiffError):
    """The changes cannot be found without reading everything; the message says why."""


def kept_snapshots(origin: Volume) -> List[Volume]:
    """Return the snapshots of `origin` that earlier runs, of any chain, kept here; raises `ProcessError`."""
    found = lvs.volumes(origin.group, 'origin="{}"'.format(origin.name), 'lv_tags={{"{}"}}'.format(KEPT_TAG))
    return [
        snapshot
        for snapshot in found
        if snapshot.is_ours
        and KEPT_TAG in snapshot.tags
        and snapshot.origin == origin.name
        and snapshot.origin_uuid == origin.uuid
    ]


def kept(origin: Volume, uuid: str) -> Optional[Volume]:
    """Return the kept snapshot of `origin` with this LV UUID; None if there is none that can be used.

    It must be thin, in the pool of `origin`, and read-only, so that it is unchanged. Raises `ProcessError`.
    """
    if not _UUID.fullmatch(uuid):
        return None
    for snapshot in kept_snapshots(origin):
        if snapshot.uuid == uuid and snapshot.is_thin and snapshot.pool == origin.pool and snapshot.is_read_only:
            return snapshot
    return None


def changed_extents(old: Volume, new: Volume) -> List[Extent]:
    """Return what changed between two snapshots of one thin volume, as extents that cover the image of `new`.

    A range that was unmapped since `old` is `ZEROS`: it now reads as zeros. One that is mapped in neither is `SAME`.
    Raises `HintError`.
    """
    if not (old.is_thin and new.is_thin and (old.group, old.pool) == (new.group, new.pool)):
        raise HintError("{} and {} are not in one thin pool".format(old.full_name, new.full_name))
    if old.size != new.size:
        raise HintError("the volume was resized from {} to {} bytes".format(old.size, new.size))
    return list(covering(_delta(old, new), CHANGED, SAME, new.size))


def mapped_extents(volume: Volume) -> List[Extent]:
    """Return which parts of a thin snapshot are mapped, as extents that cover its image; the rest reads as zeros.

    Raises `HintError`.
    """
    return list(covering(_delta(volume, volume), MAPPED, ZEROS, volume.size))


#: A range that thin_delta reports: its kind, first byte and end.
Range = Tuple[str, int, int]


def covering(ranges: List[Range], meaning: Dict[str, str], gap: str, size: int) -> Iterator[Extent]:
    """Yield extents from 0 to `size`; neighbours with the same state are joined.

    Raises `HintError` if the ranges are not in order, or if one has an unknown kind.
    """
    start, state, position = 0, gap, 0
    for kind, begin, end in ranges + [("", size, size)]:
        begin, end = min(begin, size), min(end, size)  # the last pool block may end after the volume
        if begin < position or (kind and kind not in meaning):
            raise HintError("thin_delta printed an impossible range: {} at {}".format(kind, begin))
        for next_state, first, last in ((gap, position, begin), (meaning.get(kind, gap), begin, end)):
            if last > first and next_state != state:
                if first > start:
                    yield Extent(start, first, state)
                start, state = first, next_state
        position = end
    if size > start:
        yield Extent(start, size, state)


def _delta(old: Volume, new: Volume) -> List[Range]:
    """Return the ranges that thin_delta reports; the metadata snapshot is released in any case."""
    cancelled = threading.Event()
    try:
        _check_device(new)
        pool, metadata = _pool_of(new)
        return signals.undisturbed(
            lambda: _with_metadata_snapshot(pool, lambda: _run_thin_delta(metadata, old, new, cancelled.is_set)),
            cancelled.set,
        )
    except ProcessError as error:
        raise HintError(error.message, error.hint) from error


def _check_device(volume: Volume) -> None:
    """Check the kernel's table of an active thin volume against LVM's report; raises `HintError` if they differ."""
    words = _dmsetup("table", volume.dm_path).split()
    if len(words) == 6 and words[2] == "thin":
        raise HintError("{} has an external origin, which shows where nothing is mapped".format(volume.full_name))
    expected = ["0", str(volume.size // _SECTOR), "thin", volume.thin_id]
    if words[:3] + words[4:] != expected:
        raise HintError(
            "the device of {} is not what LVM says: {}".format(volume.full_name, printable(" ".join(words), 200))
        )


def _pool_of(volume: Volume) -> Tuple[str, str]:
    """Return the device of a volume's pool, and that of the pool's metadata."""
    pools = lvs.volumes(volume.group, 'lv_name="{}"'.format(volume.pool))
    metadata = lvs.volumes(volume.group, 'lv_name="{}"'.format(pools[0].metadata)) if len(pools) == 1 else []
    if len(metadata) != 1:
        raise HintError("the metadata of the thin pool {}/{} cannot be found".format(volume.group, volume.pool))
    return pools[0].dm_path + "-tpool", metadata[0].dm_path


def _with_metadata_snapshot(pool: str, work: Callable[[], List[Range]]) -> List[Range]:
    """Do `work` while a metadata snapshot is reserved for us; one of another process is not used or released."""
    name = os.path.basename(pool)
    release = "dmsetup message {} 0 release_metadata_snap".format(name)
    words = _dmsetup("status", pool).split()
    if len(words) < 8 or words[2] != "thin-pool":
        raise HintError("the thin pool {} is not healthy: {}".format(name, printable(" ".join(words), 200)))
    if words[6] != "-":
        raise HintError("the metadata snapshot of {} is in use; if by a run that was killed: {}".format(name, release))
    _message(pool, "reserve_metadata_snap")
    try:
        return work()
    finally:
        try:
            _message(pool, "release_metadata_snap")
        except ProcessError as error:
            raise HintError("{}; by hand: {}".format(error.message, release)) from error


def _message(pool: str, message: str) -> None:
    command = ["dmsetup", "message", os.path.basename(pool), "0", message]
    process.run_gently(command, MESSAGE_TIMEOUT_S, env=lvs.environment())


def _dmsetup(command: str, path: str) -> str:
    arguments = ["dmsetup", command, os.path.basename(path)]
    return process.run(arguments, MESSAGE_TIMEOUT_S, env=lvs.environment()).stdout.decode("utf-8", "replace")


def _run_thin_delta(metadata: str, old: Volume, new: Volume, stopped: Callable[[], bool]) -> List[Range]:
    """Return the ranges that thin_delta reports from the metadata snapshot."""
    reader = DeltaReader(old.thin_id, new.thin_id)
    # newer versions would treat an argument directly after -m as its value, the block of the metadata snapshot
    command = ["thin_delta", "-m", "--thin1", old.thin_id, "--thin2", new.thin_id, metadata]
    try:
        ended = process.feed(command, DELTA_TIMEOUT_S, reader.feed, stopped, lvs.environment())
    except process.DeadlineError as error:
        raise HintError(error.message) from error
    except ProcessError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise HintError(error.message) from error
        raise HintError(
            "thin_delta is not installed there: it is in thin-provisioning-tools or device-mapper-persistent-data"
        ) from error
    if ended.returncode != 0:
        said = ended.stderr.decode("utf-8", "replace").strip().splitlines()[:1]  # the other lines are its usage
        raise HintError("thin_delta failed: {}".format(printable(" ".join(said) or "it printed nothing", 300)))
    return reader.end()


class DeltaReader:
    """Parses the XML of thin_delta in pieces. `old` and `new` are the thin ids that it must compare.

    Raises `HintError` if it has anything but the expected elements and numbers.
    """

    def __init__(self, old: str, new: str) -> None:
        self._ids = {"left": old, "right": new}
        self._block_size = 0
        self._depth: "List[str]" = []
        self._diffs = 0
        self._ranges: "List[Range]" = []
        self._parser = expat.ParserCreate("utf-8")  # always: with some encodings, expat raises other errors
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype

    def feed(self, data: bytes) -> None:
        """Parse the next piece."""
        self._parse(data, False)

    def end(self) -> List[Range]:
        """Return the ranges, after the last piece."""
        self._parse(b"", True)
        if self._diffs != 1:
            raise HintError("thin_delta printed no differences at all")
        return self._ranges

    def _parse(self, data: bytes, is_final: bool) -> None:
        try:
            self._parser.Parse(data, is_final)
        except expat.ExpatError as error:
            raise HintError("thin_delta printed what cannot be understood: {}".format(error)) from error

    def _refuse_doctype(self, *_what: object) -> None:
        raise HintError("thin_delta printed a document type")

    def _start(self, name: str, attributes: Dict[str, str]) -> None:
        where = tuple(self._depth)
        self._depth.append(name)
        if where == () and name == "superblock":
            self._block_size = self._number(attributes, "data_block_size") * _SECTOR
        elif where == ("superblock",) and name == "diff" and self._diffs == 0:
            self._diffs = 1
            if {side: attributes.get(side) for side in self._ids} != self._ids:
                raise HintError("thin_delta compared other volumes than it was asked to")
        elif where == ("superblock", "diff") and name in CHANGED:
            if len(self._ranges) >= RANGE_LIMIT:
                raise HintError("more than {} ranges changed".format(RANGE_LIMIT))
            begin = self._number(attributes, "begin") * self._block_size
            self._ranges.append((name, begin, begin + self._number(attributes, "length") * self._block_size))
        else:
            raise HintError("thin_delta printed an unknown element: {}".format(printable(name, 100)))

    def _end(self, _name: str) -> None:
        self._depth.pop()

    @staticmethod
    def _number(attributes: Dict[str, str], name: str) -> int:
        text = attributes.get(name, "")
        if not _NUMBER.fullmatch(text) or (name != "begin" and int(text) == 0):
            raise HintError("thin_delta printed {} as the {}".format(printable(repr(text), 100), name))
        return int(text)
