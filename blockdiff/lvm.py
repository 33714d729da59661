"""LVM snapshots as context managers: made, watched, and removed, thick and thin.

Shipped to the host: standard library only, Python 3.6 or newer.

A snapshot of ours has a unique name (`bd_` and random hex), the tag `blockdiff`, a tag that names the process that made
it, and one that names the UUID of its origin, all set by the same `lvcreate`. Nothing is removed unless its UUID, its
tags, its name and its origin say that it is ours. If LVM knows no origin, because `lvcreate` was cut off before that
or the origin no longer exists, the tag says which it was. What a killed agent leaves behind is removed by the next run;
agents in different PID namespaces of one host (in containers) would mistake each other's for such.
"""

import os
import re
import threading
import time
from typing import List, Optional, Sequence

from blockdiff.host import lvs
from blockdiff.host.lvcheck import full_size, resume_hint, size_in_bytes
from blockdiff.host.lvs import ORIGIN_TAG, PREFIX, TAG, LateError, Volume
from blockdiff.shared import process, signals
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import BlockdiffError, ProcessError, SourceError

#: Instead of the process's tag on a snapshot that stays on the host.
KEPT_TAG = TAG + "_kept"

#: How long the making of a snapshot may take, in seconds: a database may be locked for that time.
CREATE_TIMEOUT_S = 30.0
#: How long we look for what a failed lvcreate may have left, in seconds: the database is still standing.
QUICK_TIMEOUT_S = 5.0
#: How long a removal is tried again, and how often, in seconds: udev may hold the device open for a moment.
REMOVE_TIMEOUT_S = 30.0
REMOVE_INTERVAL_S = 0.5
#: How long the removal of what an earlier run left is tried, in seconds: this run need not wait for its user.
SWEEP_TIMEOUT_S = 5.0
#: How often the fill level of a snapshot is looked at, in seconds, and the level in percent at which it is extended.
WATCH_INTERVAL_S = 2.0
EXTEND_AT_PERCENT = 70.0
#: Begins the tag that names the process that a snapshot is for.
PROCESS_TAG = TAG + "_pid_"
# States of a `Snapshot`: there may be one from the moment when lvcreate is about to be run to the try to remove it.
_UNMADE, _MADE, _KEPT, _CLOSED = "unmade", "made", "kept", "closed"
_PROCESS = re.compile(PROCESS_TAG + r"([0-9]{1,10})_[0-9]+_[0-9a-f]+")


def process_tag(pid: int) -> str:
    """Return the tag that names a process of this boot: a PID alone may be somebody else's after a while."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip().replace("-", "")[:12]
    return "{}{}_{}_{}".format(PROCESS_TAG, pid, _start_time(pid), boot)


def _start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the boot; "0" for one that is not there or has ended."""
    try:
        with open("/proc/{}/stat".format(pid)) as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "0" if fields[0] in ("Z", "X") else fields[19]


def is_abandoned(snapshot: Volume) -> bool:
    """Return whether the process that made one of our snapshots has ended; one without its tag is left alone."""
    for tag in snapshot.tags:
        match = _PROCESS.fullmatch(tag)
        if match:
            return process_tag(int(match.group(1))) != tag
    return False


def abandoned(volume: Volume) -> List[Volume]:
    """Return what agents before us left behind of their snapshots of `volume`.

    Those of agents that are at work, and those that are kept, are not among them. Raises `ProcessError`.
    """
    tagged = lvs.volumes(volume.group, 'lv_tags={{"{}"}}'.format(TAG))
    return [snapshot for snapshot in tagged if snapshot.is_ours_of(volume) and is_abandoned(snapshot)]


def sweep(snapshots: Sequence[Volume]) -> List[str]:
    """Remove what earlier runs left, and return notes for the user; what somebody holds open stays, with a note.

    Raises `ProcessError` if another LVM command is in the way.
    """
    notes = []
    for snapshot in snapshots:
        try:
            remove(snapshot, SWEEP_TIMEOUT_S)
            notes.append("removed the snapshot {}, which an earlier run left".format(snapshot.full_name))
        except ProcessError as error:
            if isinstance(error.__cause__, LateError):
                raise
            notes.append("an earlier run left a snapshot: {}; {}".format(error.message, error.hint))
    return notes


def remove(snapshot: Volume, timeout_s: Optional[float] = None) -> None:
    """Remove a snapshot of ours, and nothing else; one that no longer exists is fine.

    LVM itself checks again what we know of it, under its lock: `lvremove` of an origin would take the origin. Raises
    `ProcessError` if it is still there after `timeout_s` seconds (`REMOVE_TIMEOUT_S`), with the command to remove it
    by hand.
    """
    same = 'lv_uuid="{}"'.format(snapshot.uuid)
    ours = '{} && lv_tags={{"{}"}} && lv_name=~"^{}" && origin="{}"'.format(same, TAG, PREFIX, snapshot.origin)
    if not snapshot.origin:
        ours += ' && lv_tags={{"{}"}}'.format(ORIGIN_TAG + snapshot.tagged_origin)
    by_hand = "remove it by hand: lvremove -y {}".format(snapshot.full_name)
    if snapshot.is_open:
        by_hand = "`fuser -vm {}` on the host shows who has it open; then {}".format(snapshot.dm_path, by_hand)
    deadline = time.monotonic() + (REMOVE_TIMEOUT_S if timeout_s is None else timeout_s)
    while True:
        failure: Optional[ProcessError] = None
        try:
            lvs.change(["lvremove", "-y", "-S", ours, snapshot.full_name], snapshot.group)
        except ProcessError as error:
            failure = error
        try:
            if not lvs.volumes(snapshot.group, same):
                return
        except ProcessError as error:
            failure = failure or error
        if time.monotonic() > deadline:
            why = failure.message if failure is not None else "lvremove reported success"
            raise ProcessError(
                "cannot remove the snapshot {}: {}".format(snapshot.full_name, why), by_hand
            ) from failure
        time.sleep(REMOVE_INTERVAL_S)


class Snapshot:
    """A read-only snapshot of `origin`, with the tags `extra_tags`. A context manager that leaves none behind.

    `size` is for thick volumes (see `lvcheck.check`). To enter it makes the snapshot, and nothing else is done in that
    time; then come `watch`, `look`, the reading of `path`, and `check`. Raises `SourceError` if it cannot be made or
    read to the end, and on the way out `ProcessError` if it cannot be removed. `close` may be called in any
    state.

    `created_s` are the seconds that the making took, `level` is the highest fill level seen, in percent (None for a
    thin one), `notes` are what the user should know.
    """

    def __init__(self, origin: Volume, size: str, *extra_tags: str) -> None:
        self.origin = origin
        self.path = ""
        self.created_s = 0.0
        self.level: "Optional[float]" = None
        self.notes: "List[str]" = []
        self._name = PREFIX + os.urandom(8).hex()
        self._selection = 'lv_name="{}"'.format(self._name)
        self._process_tag = process_tag(os.getpid())
        self._command = self._lvcreate(size, extra_tags)
        self._state = _UNMADE
        self._stopped = threading.Event()
        self._watcher: "Optional[threading.Thread]" = None

    def _lvcreate(self, size: str, extra_tags: Sequence[str]) -> List[str]:
        command = ["lvcreate", "-y", "-s", "-p", "r", "-n", self._name]
        for tag in (TAG, self._process_tag, ORIGIN_TAG + self.origin.uuid, *extra_tags):
            command += ["--addtag", tag]
        if self.origin.is_thin:
            command += ["-k", "n", "-a", "y"]
        else:  # never `-l 20%ORIGIN`: with less room than that LVM makes a smaller one
            command += ["-L", "{}b".format(size_in_bytes(size, self.origin))]
        return [*command, self.origin.full_name]

    def __enter__(self) -> "Snapshot":
        self.make()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close(error)

    def make(self) -> None:
        """Make the snapshot, and do nothing else; raises `SourceError`."""
        self._state = _MADE
        begun = time.monotonic()
        try:
            lvs.change(self._command, self.origin.group, CREATE_TIMEOUT_S)
            self.created_s = time.monotonic() - begun
        except ProcessError as error:
            hints = [error.hint, *self._clean_up_quickly()]
            self._state = _CLOSED  # what is left nevertheless is for the next run's sweep
            raise SourceError(
                "cannot make a snapshot of {}: {}".format(self.origin.full_name, error.message),
                "; ".join(hint for hint in hints if hint) or None,
            ) from error
        except BaseException:  # a signal: lvcreate has ended by now
            self.close()
            raise

    def _clean_up_quickly(self) -> List[str]:
        """Remove what a failed lvcreate left, and return hints if it left more than that."""
        hints: "List[str]" = []
        try:
            left = lvs.volumes(self.origin.group, self._selection, timeout_s=QUICK_TIMEOUT_S)
            origin = lvs.volumes(self.origin.full_name, timeout_s=QUICK_TIMEOUT_S)
        except ProcessError:
            return hints  # why there is no snapshot matters more
        hints += [resume_hint(volume) for volume in origin if volume.state == "s"]
        try:
            for found in left:
                self._remove(found, QUICK_TIMEOUT_S)
        except ProcessError as error:
            hints.append("{}; {}".format(error.message, error.hint))
        return hints

    def close(self, error: object = None) -> None:
        """Remove the snapshot, once, unless it was kept.

        Raises `ProcessError` if it is still there; if `error` is what ends the run, that has a hint instead.
        """
        if self._state != _MADE:
            self._stop_watching()
            return
        try:
            signals.undisturbed(self._end)
        except ProcessError as failure:
            if not isinstance(error, BlockdiffError):
                raise
            parts = [error.hint, failure.message, failure.hint]  # what went wrong first is the better headline
            error.hint = "; ".join(part for part in parts if part)

    def _end(self) -> None:
        self._state = _CLOSED
        self._stop_watching()
        for found in lvs.volumes(self.origin.group, self._selection):
            self._remove(found)

    def _remove(self, found: Volume, timeout_s: Optional[float] = None) -> None:
        if found.is_ours_of(self.origin):
            remove(found, timeout_s)

    def _stop_watching(self) -> None:
        self._stopped.set()
        if self._watcher is not None and self._watcher.is_alive():
            self._watcher.join(lvs.COMMAND_TIMEOUT_S + 3 * process.GENTLE_TIMEOUT_S)

    def _find(self) -> Optional[Volume]:
        """Return the snapshot as it is now; None if there is none."""
        found = lvs.volumes(self.origin.group, self._selection)
        return found[0] if found and found[0].is_ours_of(self.origin) else None

    def watch(self) -> None:
        """Begin to watch the fill level; writers need not stand still any more, and it may be long until `look`."""
        if not self.origin.is_thin:
            self._watcher = threading.Thread(target=self._watch, name="snapshot", daemon=True)
            self._watcher.start()

    def look(self) -> Volume:
        """Return the snapshot that was made.

        Raises `SourceError` if there is none, or not as it was asked for, or if it is full already.
        """
        found = self._found_or_error()
        if found is not None and found.invalid:
            raise self._overflow(found)
        if found is None or not found.is_read_only or found.state != "a":
            raise SourceError(
                "lvcreate reported success, but {}/{} {}".format(
                    self.origin.group,
                    self._name,
                    "is not there" if found is None else "has the attributes " + found.attributes,
                )
            )
        self.path = found.path if os.path.exists(found.path) else found.dm_path
        self._note_level(found)
        return found

    def _found_or_error(self) -> Optional[Volume]:
        try:
            return self._find()
        except ProcessError as error:
            raise SourceError(
                "cannot see the snapshot of {}: {}".format(self.origin.full_name, error.message), error.hint
            ) from error

    def check(self) -> None:
        """Raise `SourceError` unless everything that was read from the snapshot so far was sound.

        An overflow makes a snapshot invalid permanently, so one look after the last byte speaks for all reads.
        """
        found = self._found_or_error()
        if found is None:
            raise SourceError(
                "the snapshot of {} was removed while it was read".format(self.origin.full_name),
                "lvremove by hand, or another tool: run again",
            )
        if found.invalid:
            raise self._overflow(found)
        if found.health == "F":
            raise SourceError(
                "the thin pool {}/{} failed while a snapshot in it was read".format(found.group, found.pool),
                "see lvmthin(7) and the host's kernel log",
            )
        self._note_level(found)

    def _overflow(self, found: Volume) -> SourceError:
        least = min(full_size(self.origin), 2 * found.size)
        return SourceError(
            "the snapshot of {} overflowed: {} was too small".format(self.origin.full_name, shown_size(found.size)),
            "use at least --snapshot-size {}M; {}M is always enough".format(
                -(-least >> 20), -(-full_size(self.origin) >> 20)
            ),
        )

    def keep(self) -> None:
        """Leave the snapshot on the host: `close` and the sweeps of later runs will not touch it.

        Raises `ProcessError`; it is removed as always then.
        """
        command = ["lvchange", "--deltag", self._process_tag, "--addtag", KEPT_TAG]
        lvs.change([*command, "{}/{}".format(self.origin.group, self._name)], self.origin.group)
        self._state = _KEPT

    def _note_level(self, found: Volume) -> None:
        if found.data_percent is not None and not self.origin.is_thin:
            self.level = max(self.level or 0.0, found.data_percent)

    def _watch(self) -> None:
        """Keep an eye on the fill level of a thick snapshot, and extend it while the group has room."""
        can_grow = True
        while not self._stopped.wait(WATCH_INTERVAL_S):
            try:
                found = self._find()
            except ProcessError:
                continue  # another LVM command may be in the way; the check at the end decides
            if found is None or found.invalid:
                return
            self._note_level(found)
            if can_grow and (found.data_percent or 0.0) >= EXTEND_AT_PERCENT:
                can_grow = self._extend(found)

    def _extend(self, found: Volume) -> bool:
        """Make the snapshot half as large again, and return whether that went well.

        If it did not, the run continues, and fails if the snapshot overflows.
        """
        more = min(max(found.size // 2, found.extent_size), found.group_free)
        try:
            if more == 0:
                raise ProcessError("no room in the volume group {}".format(found.group))
            lvs.change(["lvextend", "-L", "+{}b".format(more), found.full_name], found.group)
        except ProcessError as error:
            self.notes.append(
                "the snapshot of {} is {:g}% full and cannot be extended: {}".format(
                    self.origin.full_name, found.data_percent or 0.0, error.message
                )
            )
            return False
        return True
