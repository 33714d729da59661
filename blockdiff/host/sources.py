"""The sources of a run: files and devices read as they are, or volumes read through snapshots.

Shipped to the host: standard library only, Python 3.6 or newer.

A source goes through the same steps whatever it is: `prepare` while writers continue, `take` while they are stopped,
`open` when it is its turn to be read, and `finish` after its last byte.
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
    """How a thin volume is to be read; others are read from end to end in any case.

    With `hinted` only what changed since the snapshot that the last run kept, with `audited` all of it, and that is
    checked against what changed since then; if it is a `full` generation only what is mapped.
    """

    hinted: bool = False
    audited: bool = False
    full: bool = False


class Source(ABC):
    """One source, from its first check to the end. A context manager that leaves no snapshot behind."""

    def __init__(self) -> None:
        self.notes: List[str] = []
        #: The volume group that it is in, from `prepare` on; "" for none.
        self.group = ""
        self._stack = ExitStack()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._stack.close()

    @abstractmethod
    def prepare(self) -> Dict[str, object]:
        """Check what can be checked without delaying anybody, and return what the server should know.

        Raises `SourceError`.
        """

    @abstractmethod
    def take(self) -> None:
        """Take the image's moment; writers are stopped, so nothing else is done here."""

    def watch(self) -> None:  # noqa: B027  # most sources have nothing to do
        """Take care of what was made, as soon as nobody is stopped any more: others may be read first."""

    @abstractmethod
    def open(self, reading: Reading) -> "Tuple[dump.FileSource, Optional[List[Extent]]]":
        """Return what to read, and what an audit is to be checked against."""

    def opened(self) -> Dict[str, object]:
        """Return what the server should know of what is read."""
        return {}

    def explain(self) -> Optional[SourceError]:
        """Return the cause of an error of reading, if more is known of it."""
        return None

    @abstractmethod
    def finish(self) -> Dict[str, object]:
        """Make sure that all that was read was sound, put everything away, and return what the server should know."""


class LiveSource(Source):
    """A file or device that is read as it is; `path` must be one when the moment is taken.

    With `is_made` it need not be there before: what the user runs may make it then.
    """

    def __init__(self, path: bytes, is_made: bool = False) -> None:
        super().__init__()
        self._path = path
        self._is_made = is_made

    def prepare(self) -> Dict[str, object]:
        """See whether it can be opened: that is all there is to check."""
        if not self._is_made:
            with dump.FileSource(self._path):
                pass
        return {}

    def take(self) -> None:
        """Open it, and begin to watch it: its moment is as long as the reading takes."""
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
    """A logical volume, read through a snapshot of `size` (see `lvcheck.check`) that carries a tag of its `owner`.

    `chain` names that for people (``""``: not at all).
    `kept` is the LV UUID of the snapshot that the chain's last run kept, ``""`` for none. With `keep` this run's stays
    on the host. A `rehearsal` removes nothing.
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
            self._leave(error)  # a signal may have come just before

    def _leave(self, error: object = None) -> None:
        if self._prepared is not None:
            self._prepared.close(error)

    @property
    def _snapshot(self) -> lvm.Snapshot:
        assert self._prepared is not None, "`prepare` comes first"
        return self._prepared

    def prepare(self) -> Dict[str, object]:
        """Sweep what earlier runs left, and see whether there is room."""
        self._origin = lvcheck.find(self._path)
        if not self._rehearsal:
            self._sweep()
            self._origin = lvcheck.find(self._path)  # what was removed made room
        self.notes += lvcheck.check(self._origin, self._size, self._keep)
        self._prepared = lvm.Snapshot(self._origin, self._size, self._tag, *self._chain_tags)
        self.group = self._origin.group
        return {"uuid": self._origin.uuid, "segtype": self._origin.segtype}

    def _sweep(self) -> None:
        """Remove what killed agents left, and what runs of this owner kept that no chain continues from."""
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
        """See `Source`: a snapshot fills from its making on, and is extended."""
        self._snapshot.watch()

    def open(self, reading: Reading) -> "Tuple[dump.FileSource, Optional[List[Extent]]]":
        """Open the snapshot, with what is known of its extents."""
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
        """Return what is known of the volume's extents, and how; None, and a note that says why, if nothing is."""
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
        """See `Source`: a snapshot that overflowed is all read errors from then on."""
        try:
            self._snapshot.check()
        except SourceError as cause:
            return cause
        return None

    def finish(self) -> Dict[str, object]:
        """Check the snapshot once more, remove or keep it, and remove the one that was kept before."""
        self._snapshot.check()
        self.notes += self._snapshot.notes
        try:
            if self._keep:
                self._snapshot.keep()
            self._stack.close()
            self._snapshot.close()
            if self._kept is not None:
                lvm.remove(self._kept)
        except ProcessError as error:  # the image is sound nevertheless
            self.notes.append("{}{}".format(error.message, "; " + error.hint if error.hint else ""))
            return {"touched": False, "left": True, **self._fields()}
        return {"touched": False, "left": False, **self._fields()}

    def _fields(self) -> Dict[str, object]:
        level = self._snapshot.level
        return {"level_permille": None if level is None else int(level * 10), "kept": self._keep}


def locate(directory: str, paths: List[str]) -> Tuple[str, Optional[int]]:
    """Return the device number on which `directory` is, as text, and which of the devices `paths` is beneath it.

    The number is ``""`` if there is no such directory here; the index is None if none of the devices is.
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
