"""LVM snapshots as context managers: made, watched, and removed, thick and thin.

Shipped to the host: standard library only, Python 3.6 or newer.

A snapshot of ours has a unique name (`bd_` and random hex), the tag `blockdiff`, a tag that names the process that made
it, and one that names the UUID of its origin, all set by the same `lvcreate`. Nothing is removed unless its UUID, tags,
name and origin show that it is ours. If LVM has no origin for it, because `lvcreate` was interrupted or the origin no
longer exists, the tag says which it was. The next run removes snapshots that a killed agent has left. Agents in
different PID namespaces of one host (in containers) would remove each other's snapshots.
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

#: Replaces the process's tag on a snapshot that stays on the host.
KEPT_TAG = TAG + "_kept"

#: How long `lvcreate` may take, in seconds: a database may be locked for that time.
CREATE_TIMEOUT_S = 30.0
#: How long each command may take that looks for, or removes, what a failed `lvcreate` left, in seconds: a database may
#: still be locked.
QUICK_TIMEOUT_S = 5.0
#: How long to try a removal, and the time between two tries, in seconds: udev may hold the device open for a moment.
REMOVE_TIMEOUT_S = 30.0
REMOVE_INTERVAL_S = 0.5
#: How long to try to remove what an earlier run left, in seconds: this run need not wait for a process that uses it.
SWEEP_TIMEOUT_S = 5.0
#: How often to check the fill level of a snapshot, in seconds, and the level in percent at which it is extended.
WATCH_INTERVAL_S = 2.0
EXTEND_AT_PERCENT = 70.0
#: The prefix of the tag that names the process for which a snapshot was made.
PROCESS_TAG = TAG + "_pid_"
# States of a `Snapshot`. "made" begins just before lvcreate is run, and ends with the attempt to remove the snapshot.
_UNMADE, _MADE, _KEPT, _CLOSED = "unmade", "made", "kept", "closed"
_PROCESS = re.compile(PROCESS_TAG + r"([0-9]{1,10})_[0-9]+_[0-9a-f]+")


def process_tag(pid: int) -> str:
    """Return the tag that names a process of this boot: its PID alone may later belong to another process."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip().replace("-", "")[:12]
    return "{}{}_{}_{}".format(PROCESS_TAG, pid, _start_time(pid), boot)


def _start_time(pid: int) -> str:
    """Return when a process started, in clock ticks since the boot; "0" if it does not exist or has ended."""
    try:
        with open("/proc/{}/stat".format(pid)) as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return "0"
    return "0" if fields[0] in ("Z", "X") else fields[19]


def is_abandoned(snapshot: Volume) -> bool:
    """Return whether the process that made one of our snapshots has ended; False if no tag names a process."""
    for tag in snapshot.tags:
        match = _PROCESS.fullmatch(tag)
        if match:
            return process_tag(int(match.group(1))) != tag
    return False


def abandoned(volume: Volume) -> List[Volume]:
    """Return the snapshots of `volume` that earlier agents left.

    Snapshots of running agents, and kept snapshots, are not among them. Raises `ProcessError`.
    """
    tagged = lvs.volumes(volume.group, 'lv_tags={{"{}"}}'.format(TAG))
    return [snapshot for snapshot in tagged if snapshot.is_ours_of(volume) and is_abandoned(snapshot)]


def sweep(snapshots: Sequence[Volume]) -> List[str]:
    """Remove what earlier runs left, and return notes for the user.

    A snapshot that cannot be removed stays, and a note says so. Raises `ProcessError` if LVM does not answer in time.
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
    """Remove a snapshot of ours, and nothing else; it is not an error if it no longer exists.

    LVM checks again, under its lock, that the volume is this snapshot; otherwise `lvremove` could remove another one,
    such as the origin. Raises `ProcessError` if it still exists after `timeout_s` seconds (by default
    `REMOVE_TIMEOUT_S`), with the command to remove it by hand.
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
    """A read-only snapshot of `origin`, with the tags `extra_tags`. A context manager that removes it at the end.

    `size` is for thick volumes (see `lvcheck.check`). Entering makes the snapshot, and does nothing else. After that,
    call `watch` and `look`, read `path`, and call `check`. Raises `SourceError` if the snapshot cannot be made or read
    to the end, and at exit `ProcessError` if it cannot be removed. `close` may be called in any state.

    `created_s` is how many seconds `lvcreate` took, `level` the highest fill level seen, in percent (None for a thin
    snapshot), and `notes` are for the user.
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
        else:  # never `-l 20%ORIGIN`: if there is less room, LVM makes a smaller snapshot
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
            self._state = _CLOSED  # if something is left nevertheless, the next run removes it
            raise SourceError(
                "cannot make a snapshot of {}: {}".format(self.origin.full_name, error.message),
                "; ".join(hint for hint in hints if hint) or None,
            ) from error
        except BaseException:  # a signal; lvcreate has ended at this point
            self.close()
            raise

    def _clean_up_quickly(self) -> List[str]:
        """Remove what a failed lvcreate left; return hints if the origin is suspended, or the removal failed."""
        hints: "List[str]" = []
        try:
            left = lvs.volumes(self.origin.group, self._selection, timeout_s=QUICK_TIMEOUT_S)
            origin = lvs.volumes(self.origin.full_name, timeout_s=QUICK_TIMEOUT_S)
        except ProcessError:
            return hints  # it is more important to report why there is no snapshot
        hints += [resume_hint(volume) for volume in origin if volume.state == "s"]
        try:
            for found in left:
                self._remove(found, QUICK_TIMEOUT_S)
        except ProcessError as error:
            hints.append("{}; {}".format(error.message, error.hint))
        return hints

    def close(self, error: object = None) -> None:
        """Remove the snapshot, once, unless it was kept.

        Raises `ProcessError` if it cannot be removed; if another `error` ends the run, that error gets a hint instead.
        """
        if self._state != _MADE:
            self._stop_watching()
            return
        try:
            signals.undisturbed(self._end)
        except ProcessError as failure:
            if not isinstance(error, BlockdiffError):
                raise
            parts = [error.hint, failure.message, failure.hint]  # the first error is the one to report
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
        """Return the current state of the snapshot; None if it does not exist."""
        found = lvs.volumes(self.origin.group, self._selection)
        return found[0] if found and found[0].is_ours_of(self.origin) else None

    def watch(self) -> None:
        """Begin to watch the fill level. To be called when writers continue; `look` may follow much later."""
        if not self.origin.is_thin:
            self._watcher = threading.Thread(target=self._watch, name="snapshot", daemon=True)
            self._watcher.start()

    def look(self) -> Volume:
        """Return the snapshot that was made.

        Raises `SourceError` if it does not exist, is not as requested, or has already overflowed.
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
        """Raise `SourceError` unless everything that was read from the snapshot so far is valid.

        An overflow makes a snapshot invalid permanently, so one check after the last read is enough for all reads.
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
        """Leave the snapshot on the host: `close` does not remove it, and later runs do not treat it as abandoned.

        Raises `ProcessError`; then `close` removes it as always.
        """
        command = ["lvchange", "--deltag", self._process_tag, "--addtag", KEPT_TAG]
        lvs.change([*command, "{}/{}".format(self.origin.group, self._name)], self.origin.group)
        self._state = _KEPT

    def _note_level(self, found: Volume) -> None:
        if found.data_percent is not None and not self.origin.is_thin:
            self.level = max(self.level or 0.0, found.data_percent)

    def _watch(self) -> None:
        """Watch the fill level of a thick snapshot, and extend it while the volume group has room."""
        can_grow = True
        while not self._stopped.wait(WATCH_INTERVAL_S):
            try:
                found = self._find()
            except ProcessError:
                continue  # another LVM command may hold the lock; the check at the end decides
            if found is None or found.invalid:
                return
            self._note_level(found)
            if can_grow and (found.data_percent or 0.0) >= EXTEND_AT_PERCENT:
                can_grow = self._extend(found)

    def _extend(self, found: Volume) -> bool:
        """Extend the snapshot by half its size, or by the room that is left; return whether that worked.

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
