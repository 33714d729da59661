"""Finds out whether a source that is read without a snapshot was written to while it was read, or was in use.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import List, NamedTuple, Optional

from blockdiff.dump import FileSource
from blockdiff.shared import devices


class Seen(NamedTuple):
    """What happened to a source: `touched` says whether it was written to; None if that is not known.

    `how` says how it is in use and how it was written to, in words that can follow its path; "" if it is not in use and
    was not written to.
    """

    touched: Optional[bool]
    how: str


class Witness:
    """Watches a source from the moment when this object is made.

    Earlier writes that are still in memory are flushed to the disk first, so only later writes are counted. A mounted
    file system writes to its device without updating the device's own cache. This cache is dropped; otherwise old
    blocks would be read.
    """

    def __init__(self, file: FileSource) -> None:
        self._file = file
        self._own = devices.number(file.status.st_rdev) if file.kind == "device" else ""
        self._flushed = file.flush()
        self._devices = devices.above(self._own) if self._own else devices.on_file(file.status)
        self._use = devices.use(self._devices, self._own)
        if self._use:
            file.forget()
        file.note_status()
        self._before = {each: devices.sectors(each) for each in self._devices}

    def look(self) -> Seen:
        """Return what happened since this object was made."""
        flushed = self._file.flush() and self._flushed
        written = [each for each in self._devices if self._is_written(each)]
        use = self._use or devices.use(self._devices, self._own)
        if self._file.kind == "file":
            how = self._file.changed()
            touched: Optional[bool] = bool(how or written)
        else:
            how = ""
            touched = True if written else (False if flushed and self._counts() else None)
        if touched:
            how = "{} while it was read".format(how or "was written to" + self._through(written, use))
        elif touched is None:
            how = "does not report whether it was written to"
        return Seen(touched, " and ".join(part for part in (use, how) if part))

    def _is_written(self, device: str) -> bool:
        before, now = self._before[device], devices.sectors(device)
        return before is not None and now is not None and now.written != before.written

    def _counts(self) -> bool:
        """Return whether the kernel counts the device's sectors: a read that we make now must change the count."""
        before = devices.sectors(self._own)
        self._file.read_past_cache()
        now = devices.sectors(self._own)
        return None not in (self._before[self._own], before, now) and before != now

    def _through(self, written: List[str], use: str) -> str:
        others = [each for each in written if each != self._own]
        return " through {}".format(devices.name(others[-1])) if others and not use else ""
