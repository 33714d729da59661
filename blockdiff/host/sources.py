"""The sources of a run: files and devices that are read as they are, or volumes that are read through snapshots.

Shipped to the host: standard library only, Python 3.6 or newer.

All kinds of sources have the same steps: `prepare` while writers continue, `take` while they are stopped, `watch` when
they continue, `open` when it is the source's turn to be read, and `finish` after its last byte.
"""

import os
from abc import ABC, abstractmethod
from contextlib import ExitStack
from typing import Dict, List, NamedTuple, Optional, Tuple

from blockdiff import dump, lvm
from blockdiff.host import leftovers, lvcheck, lvs, thin, witness
from blockdiff.shared import devices
from blockdiff.shared.errors import ProcessError, SourceError
from blockdiff.shared.extents import Extent


class Reading(NamedTuple):
    """How to read a thin volume; other sources are always read completely.

    With `hinted`, only the parts are read that changed since the snapshot that the last run kept, as thin_delta reports
    them. With `audited`, everything is read, and the report of thin_delta is checked against it. For a `full`
    generation, only the mapped parts are read.
    """

    hinted: bool = False
    audited: bool = False
    full: bool = False


class Source(ABC):
    """One source, from its first check to the end. A context manager that removes the snapshot, unless it is kept."""

    def __init__(self) -> None:
        self.notes: List[str] = []
        #: The volume group of the source, known after `prepare`; "" for none.
        self.group = ""
        self._stack = ExitStack()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stack.close()

    @abstractmethod
    def prepare(self) -> Dict[str, object]:
        """Check what can be checked while writers continue, and return what the server should know.

        Raises `SourceError`.
        """

    @abstractmethod
    def take(self) -> None:
        """Take the moment of the image. Nothing else is done here, because writers are stopped."""

    def watch(self) -> None:  # noqa: B027  # most sources have nothing to do
        """Watch over the snapshot as soon as writers continue: other sources may be read first."""

    @abstractmethod
    def open(self, reading: Reading) -> "Tuple[dump.FileSource, Optional[List[Extent]]]":
        """Return what to read, and for an audit the extents that are checked against the scan, otherwise None."""

    def opened(self) -> Dict[str, object]:
        """Return what the server should know about the opened source."""
        return {}

    def explain(self) -> Optional[SourceError]:
        """Return the cause of a read error, if it is known."""
        return None

    @abstractmethod
    def finish(self) -> Dict[str, object]:
        """Make sure that everything that was read is valid, clean up, and return what the server should know."""


class LiveSource(Source):
    """A file or device that is read as it is; `path` must exist when the moment is taken.

    With `is_made` it need not exist before, because the user's command `--before` may make it.
    """

    def __init__(self, path: bytes, is_made: bool = False) -> None:
        super().__init__()
        self._path = path
        self._is_made = is_made

    def prepare(self) -> Dict[str, object]:
        """Check that it can be opened; nothing else can be checked."""
        if not self._is_made:
            with dump.FileSource(self._path):
                pass
        return {}

    def take(self) -> None:
        """Open it, and begin to watch it: its moment lasts as long as the reading."""
        self._file = self._stack.enter_context(dump.FileSource(self._path))
        self._witness = witness.Witness(self._file)

    def open(self, reading: Reading) -> "Tuple[dump.FileSource, Optional[List[Extent]]]":
        """See `Source`."""
        return self._file, None

    def finish(self) -> Dict[str, object]:
        """See `Source`."""
        self._file.check_size()
        seen = self._witness.look()
        self._stack.close()
        return {"touched": seen.touched, "how": seen.how}


class VolumeSource(Source):
    """A logical volume that is read through a snapshot of `size` (see `lvcheck.check`) with a tag for its `owner`.

    `chain` goes into another tag, for people (``""``: no such tag). `kept` is the LV UUID of the snapshot that the
    chain's last run kept, ``""`` for none. With `keep`, the snapshot of this run stays on the host. With `rehearsal`,
    nothing that earlier runs left is removed.
    """

    def __init__(
        self, path: bytes, size: str, owner: str, chain: str, kept: str, keep: bool, rehearsal: bool = False
    ) -> None:
        super().__init__()
        self._rehearsal = rehearsal
        self._path = os.fsdecode(path)
        self._size = size
        self._tag = lvs.TAG + "_owner_" + owner
        self._chain_tags = [leftovers.chain_tag(chain)] if chain else []
        self._prepared: Optional[lvm.Snapshot] = None
        self._kept_uuid = kept
        self._kept: Optional[lvs.Volume] = None
        self._keep = keep
        self._opened: Dict[str, object] = {}

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            super().__exit__(kind, error, trace)
            self._leave(error)
        finally:
            self._leave(error)  # again: a signal may have interrupted the first call

    def _leave(self, error: object = None) -> None:
        if self._prepared is not None:
            self._prepared.close(error)

    @property
    def _snapshot(self) -> lvm.Snapshot:
        assert self._prepared is not None, "`prepare` comes first"
        return self._prepared

    def prepare(self) -> Dict[str, object]:
        """Remove what earlier runs left, and check whether a snapshot can be made."""
        self._origin = lvcheck.find(self._path)
        if not self._rehearsal:
            self._sweep()
            self._origin = lvcheck.find(self._path)  # the removal made room
        self.notes += lvcheck.check(self._origin, self._size, self._keep)
        self._prepared = lvm.Snapshot(self._origin, self._size, self._tag, *self._chain_tags)
        self.group = self._origin.group
        return {"uuid": self._origin.uuid, "segtype": self._origin.segtype}

    def _sweep(self) -> None:
        """Remove snapshots that killed agents left, and those kept for this owner from which no run will continue."""
        left = lvm.abandoned(self._origin)
        for snapshot in thin.kept_snapshots(self._origin):
            if self._tag in snapshot.tags and snapshot.uuid != self._kept_uuid:
                left.append(snapshot)
        self.notes += lvm.sweep(left)
        if self._kept_uuid:
            self._kept = thin.kept(self._origin, self._kept_uuid)

    def take(self) -> None:
        """Make the snapshot."""
        self._snapshot.make()

    def watch(self) -> None:
        """See `Source`: a snapshot fills as soon as it exists, and is extended if necessary."""
        self._snapshot.watch()

    def open(self, reading: Reading) -> "Tuple[dump.FileSource, Optional[List[Extent]]]":
        """Open the snapshot, with what is known about its extents."""
        found = self._snapshot.look()
        extents, how = self._extents(reading, found) if self._origin.is_thin else (None, "")
        claimed = extents if reading.audited else None
        self._opened = {"snapshot": found.uuid, "path": self._snapshot.path, "extents": how}
        file = dump.FileSource(os.fsencode(self._snapshot.path), None if reading.audited else extents)
        return self._stack.enter_context(file), claimed

    def opened(self) -> Dict[str, object]:
        """See `Source`."""
        return self._opened

    def _extents(self, reading: Reading, new: lvs.Volume) -> "Tuple[Optional[List[Extent]], str]":
        """Return what is known about the volume's extents, and how it is known; None if nothing is known.

        If something should have been known, a note says why it is not.
        """
        try:
            if reading.full:
                return thin.mapped_extents(new), "mapped"
            if not (reading.hinted or reading.audited):
                return None, ""
            if self._kept is None:
                raise thin.HintError("the snapshot that the last run kept is not there")
            return thin.changed_extents(self._kept, new), "audited" if reading.audited else "changed"
        except thin.HintError as error:
            self.notes.append("everything is read: {}".format(error))
            return None, ""

    def explain(self) -> Optional[SourceError]:
        """See `Source`: after a snapshot has overflowed, every read of it fails."""
        try:
            self._snapshot.check()
        except SourceError as cause:
            return cause
        return None

    def finish(self) -> Dict[str, object]:
        """Check the snapshot once more, remove or keep it, and remove the one that the last run kept."""
        self._snapshot.check()
        self.notes += self._snapshot.notes
        try:
            if self._keep:
                self._snapshot.keep()
            self._stack.close()
            self._snapshot.close()
            if self._kept is not None:
                lvm.remove(self._kept)
        except ProcessError as error:  # the image is valid nevertheless
            self.notes.append("{}{}".format(error.message, "; " + error.hint if error.hint else ""))
            return {"touched": False, "left": True, **self._fields()}
        return {"touched": False, "left": False, **self._fields()}

    def _fields(self) -> Dict[str, object]:
        level = self._snapshot.level
        return {"level_permille": None if level is None else int(level * 10), "kept": self._keep}


def locate(directory: str, paths: List[str]) -> Tuple[str, Optional[int]]:
    """Return the number of the device that `directory` is on, as text, and which of the devices `paths` is beneath it.

    The number is ``""`` if the directory does not exist; the index is None if none of the devices `paths` is beneath.
    """
    try:
        number = os.stat(directory).st_dev
        wanted = [os.stat(path).st_rdev for path in paths]
    except OSError:
        return "", None
    shown = devices.number(number)
    beneath = devices.beneath(shown)
    for i, device in enumerate(wanted):
        if devices.number(device) in beneath:
            return shown, i
    return shown, None
