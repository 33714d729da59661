"""What LVM reports about its logical volumes, and how its commands are run.

Shipped to the host: standard library only, Python 3.6 or newer.

Decisions depend on the state that `lvs` reports, never on messages.
"""

import json
import os
import re
import time
from typing import Dict, List, NamedTuple, Optional, Sequence

from blockdiff.shared import process
from blockdiff.shared.errors import ProcessError, printable

TAG = "blockdiff"
PREFIX = "bd_"
#: The prefix of the tag that names the origin of a snapshot of ours, by its LV UUID.
ORIGIN_TAG = TAG + "_origin_"

#: How many characters of a command's messages are shown at most.
_WORDS_LIMIT = 1000
#: The semaphores of this machine, and the upper 16 bits of the keys of those with which device-mapper waits for udev.
_SEMAPHORES = "/proc/sysvipc/sem"
_COOKIE_MAGIC = 0x0D4D

#: How long one LVM command may take, in seconds: another command may hold the volume group's lock.
COMMAND_TIMEOUT_S = 60.0

_TIME = re.compile(r"([0-9]{4}-[0-9]{2}-[0-9]{2}) ([0-9]{2}:[0-9]{2}:[0-9]{2}) ([+-][0-9]{2})([0-9]{2})")
_FIELDS = (
    "lv_uuid,lv_name,vg_name,lv_path,lv_dm_path,lv_size,segtype,pool_lv,metadata_lv,origin,origin_uuid,lv_tags,"
    "lv_attr,data_percent,metadata_percent,lv_snapshot_invalid,vg_free,vg_extent_size,thin_id,lv_time"
)


class LateError(ProcessError):
    """An LVM command did not end in time: usually another one holds the lock of the volume group."""


class MissingError(ProcessError):
    """LVM's commands are not installed."""


class Volume(NamedTuple):
    """What `lvs` reports about a logical volume; sizes in bytes, levels in percent (None if there is none).

    `path` is ``""`` for a hidden volume, `attributes` is ``lv_attr``, and `metadata` is the name of a pool's metadata
    volume. If a volume has no pool or no origin, the names, UUIDs and ids of these are ``""``. `made` is the time when
    it was made, in ISO 8601; ``""`` if LVM's settings choose another format of times.
    """

    uuid: str
    name: str
    group: str
    path: str
    dm_path: str
    size: int
    segtype: str
    pool: str
    metadata: str
    origin: str
    origin_uuid: str
    tags: List[str]
    attributes: str
    data_percent: Optional[float]
    metadata_percent: Optional[float]
    invalid: bool
    group_free: int
    extent_size: int
    thin_id: str
    made: str

    @property
    def full_name(self) -> str:
        """``group/name``, as LVM's commands accept it."""
        return self.group + "/" + self.name

    @property
    def is_thin(self) -> bool:
        """Whether it is a volume of a thin pool."""
        return self.segtype == "thin"

    @property
    def is_ours(self) -> bool:
        """Whether it is a snapshot that an agent made, or the unfinished snapshot of an interrupted LVM command.

        When LVM makes a snapshot, it sets the origin last; when it removes one, it clears the origin first. If there is
        no origin, the tag names it.
        """
        return self.name.startswith(PREFIX) and TAG in self.tags and bool(self.origin or self.tagged_origin)

    @property
    def tagged_origin(self) -> str:
        """The LV UUID of its origin, from the tag that an agent set; ``""`` without that tag."""
        found = [tag[len(ORIGIN_TAG) :] for tag in self.tags if tag.startswith(ORIGIN_TAG)]
        return found[0] if len(found) == 1 else ""

    def is_ours_of(self, origin: "Volume") -> bool:
        """Return whether it is ours, and a snapshot of the volume `origin`."""
        if not self.is_ours or self.group != origin.group:
            return False
        return self.origin == origin.name if self.origin else self.tagged_origin == origin.uuid

    @property
    def is_open(self) -> bool:
        """Whether its device is open, for example because it is mounted."""
        return self.attributes[5:6] == "o"

    @property
    def is_read_only(self) -> bool:
        """Whether writing to it is forbidden."""
        return self.attributes[1:2] in ("r", "R")

    @property
    def state(self) -> str:
        """The fifth character of ``lv_attr``: ``a`` active, ``-`` inactive, ``s`` suspended, ``I`` invalid, …"""
        return self.attributes[4:5]

    @property
    def health(self) -> str:
        """The ninth character of ``lv_attr``: ``-`` healthy, ``p`` disk missing, ``F`` thin pool failed, …"""
        return self.attributes[8:9]


def environment() -> Dict[str, str]:
    """Return the environment for LVM's commands: English, no warnings about our pipes, and sbin in the PATH."""
    path = os.environ.get("PATH", "/usr/bin:/bin") + ":/usr/local/sbin:/usr/sbin:/sbin"
    return dict(os.environ, LC_ALL="C", LVM_SUPPRESS_FD_WARNINGS="1", PATH=path)


def volumes(place: str, *selection: str, timeout_s: Optional[float] = None) -> List[Volume]:
    """Return the volumes of `place` (a volume group, a volume, its path, or ``""``: all), hidden ones included.

    `selection` are conditions in LVM's selection language; a volume must meet all of them. Raises `ProcessError`, and
    `LateError` if LVM has not answered after `timeout_s` seconds (by default `COMMAND_TIMEOUT_S`).
    """
    timeout_s = COMMAND_TIMEOUT_S if timeout_s is None else timeout_s
    command = ["lvs", "--reportformat", "json", "--units", "b", "--nosuffix", "-a", "-o", _FIELDS]
    command += ["-S", " && ".join(selection)] if selection else []
    command += ["--", place] if place else []
    try:
        completed = process.run(command, timeout_s, env=environment(), check=False)
    except process.DeadlineError as error:
        raise _locked("lvs", place, timeout_s) from error
    except ProcessError as error:
        raise _not_started(error) from error
    if completed.returncode == 0:
        return parse_report(completed.stdout)
    try:
        # a problem of another volume, such as a missing disk, does not make the report on this one wrong
        found = parse_report(completed.stdout)
    except ProcessError:
        found = []
    if not found:
        _check("lvs", completed)
    return found


def setting(name: str) -> Optional[int]:
    """Return a number in LVM's settings, such as ``activation/thin_pool_autoextend_threshold``; None if unknown."""
    try:
        completed = process.run(["lvmconfig", "--type", "full", name], COMMAND_TIMEOUT_S, env=environment())
        return int(completed.stdout.decode("ascii", "replace").partition("=")[2])
    except (ProcessError, ValueError):
        return None


def change(arguments: Sequence[str], group: str, timeout_s: Optional[float] = None) -> None:
    """Run an LVM command that changes the volume group `group`. The command is never killed (`process.run_gently`).

    Raises `ProcessError`, and `LateError` if it has not ended after `timeout_s` seconds (by default
    `COMMAND_TIMEOUT_S`).
    """
    timeout_s = COMMAND_TIMEOUT_S if timeout_s is None else timeout_s
    begun = int(time.time())
    try:
        completed = process.run_gently(arguments, timeout_s, env=environment(), check=False)
    except process.DeadlineError as error:
        if is_waiting_for_udev(begun):
            raise LateError(
                "{} did not end within {:g} s{}: it waits for udev, which does not answer".format(
                    arguments[0], timeout_s, error.more
                ),
                "see `systemctl status systemd-udevd` and `dmsetup udevcookies` on the host",
            ) from error
        raise _locked(arguments[0], group, timeout_s, error.more) from error
    except ProcessError as error:
        raise _not_started(error) from error
    _check(arguments[0], completed)


def _not_started(error: ProcessError) -> ProcessError:
    """Return the error to raise for a command that could not be started."""
    if isinstance(error.__cause__, FileNotFoundError):
        return MissingError("LVM is not installed there", "install the package lvm2 on the host")
    return error


def _check(command: str, completed: process.Completed) -> None:
    """Raise `ProcessError` with all messages of an LVM command, unless its status is 0: one line may be too little."""
    if completed.returncode != 0:
        lines = [line.strip() for line in completed.stderr.decode("utf-8", "replace").splitlines()]
        words = printable("; ".join(line for line in lines if line), _WORDS_LIMIT)
        how = process.status_text(completed.returncode)
        raise ProcessError("{} {}{}".format(command, how, ": " + words if words else ""))


def _locked(command: str, place: str, timeout_s: float, more: str = "") -> LateError:
    return LateError(
        "{} did not end within {:g} s{}: another LVM command seems to hold the lock of the volume group of {}".format(
            command, timeout_s, more, printable(place)
        ),
        "ps -C lvcreate,lvremove,lvextend,lvconvert,pvmove,vgcfgbackup on the host shows which",
    )


def is_waiting_for_udev(begun: int) -> bool:
    """Return whether a device-mapper command that began at `begun` (seconds since 1970) is waiting for udev.

    It waits with a semaphore. Semaphores of commands that were killed stay, but they are older.
    """
    try:
        with open(_SEMAPHORES) as file:
            rows = [line.split() for line in file][1:]
        return any(int(row[0]) >> 16 == _COOKIE_MAGIC and int(row[-1]) >= begun for row in rows)
    except (OSError, ValueError, IndexError):
        return False


def parse_report(output: bytes) -> List[Volume]:
    """Return the volumes in the JSON report that `lvs` printed; raises `ProcessError` if that is not valid.

    A volume with several segments has a row for each of them, but is returned once.
    """
    try:
        report = json.loads(output.decode("utf-8", "replace"))["report"][0]
        rows = report["lv"] if "lv" in report else report["seg"]
        found = [_volume(row) for row in rows]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ProcessError(
            "lvs printed a report that cannot be understood: {}".format(printable(str(error)))
        ) from error
    return list({volume.uuid: volume for volume in reversed(found)}.values())[::-1]


def _volume(row: Dict[str, str]) -> Volume:
    if not all(isinstance(value, str) for value in row.values()):
        raise TypeError("a column is not text")
    made = _TIME.fullmatch(row["lv_time"].strip())
    extent_size = int(row["vg_extent_size"])
    if extent_size <= 0:
        raise ValueError("the extents of a volume group have {} bytes".format(extent_size))
    return Volume(
        uuid=row["lv_uuid"],
        name=row["lv_name"].strip("[]"),
        group=row["vg_name"],
        path=row["lv_path"],
        dm_path=row["lv_dm_path"].strip("[]"),
        size=int(row["lv_size"]),
        segtype=row["segtype"],
        pool=row["pool_lv"].strip("[]"),
        metadata=row["metadata_lv"].strip("[]"),
        origin=row["origin"].strip("[]"),
        origin_uuid=row["origin_uuid"],
        tags=[tag for tag in row["lv_tags"].split(",") if tag],
        attributes=row["lv_attr"],
        data_percent=float(row["data_percent"]) if row["data_percent"] else None,
        metadata_percent=float(row["metadata_percent"]) if row["metadata_percent"] else None,
        invalid=row["lv_snapshot_invalid"] not in ("", "0", "-1", "unknown") or row["lv_attr"][4:5] in ("I", "S"),
        group_free=int(row["vg_free"]),
        extent_size=extent_size,
        thin_id=row["thin_id"],
        made="{}T{}{}:{}".format(*made.groups()) if made else "",
    )
