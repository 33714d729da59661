"""What the kernel reports about block devices: what they are made of, what is on them, who uses them, what was written.

Shipped to the host: standard library only, Python 3.6 or newer.

A device is identified by its number, such as ``8:1``. What the kernel does not report, or no longer reports, is
skipped: a device may be removed at any moment.
"""

import glob
import os
import re
import stat
from typing import Callable, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

#: Where the kernel reports it.
SYS = "/sys"
PROC = "/proc"

#: The kernel's name of a logical volume: group, hyphen, volume. Hyphens in the names of group and volume are doubled.
_VOLUME = re.compile(r"((?:[^-]|--)+)-((?:[^-]|--)+)")

#: The columns of a device's ``stat``: sectors read, written, and (Linux 4.18 and newer) discarded.
_READ, _WRITTEN, _DISCARDED = 2, 6, 13


class Mount(NamedTuple):
    """A device that is mounted at `place`; `writable` says whether the file system may write to the device."""

    device: str
    place: str
    writable: bool


class Sectors(NamedTuple):
    """How many sectors of a device were read, and how many written or discarded, since the device was created."""

    read: int
    written: int


def number(device: int) -> str:
    """Return the number of a device, from the `st_dev` or `st_rdev` of a file."""
    return "{}:{}".format(os.major(device), os.minor(device))


def name(device: str) -> str:
    """Return the name of a device that people use: ``sda1``, or its name in device-mapper."""
    place = _place(device)
    return content(os.path.join(place, "dm", "name")) or os.path.basename(os.path.realpath(place))


def beneath(device: str) -> List[str]:
    """Return a device and all devices that it is made of."""
    return _closure([device], lambda each: _numbers(os.path.join(_place(each), "slaves", "*")))


def disk_of(device: str) -> List[str]:
    """Return a device with its partitions, and the disk if the device is a partition of one: one piece of hardware."""
    place = os.path.realpath(_place(device))
    disk = _numbers(os.path.dirname(place)) if os.path.exists(os.path.join(place, "partition")) else []
    return [device, *_partitions(device), *disk]


def above(device: str) -> List[str]:
    """Return a device and all devices on it: its partitions, and those that device-mapper, md and loop make of it."""
    return _closure([device], _on)


def volume_beneath(device: str) -> str:
    """Return the path of the logical volume beneath a device; without one, the device's own path; ``""``: unknown."""
    for each in beneath(device):
        mapped, uuid = (content(os.path.join(_place(each), "dm", field)) for field in ("name", "uuid"))
        match = _VOLUME.fullmatch(mapped)
        if uuid.startswith("LVM-") and match is not None:
            return "/dev/{}/{}".format(*(part.replace("--", "-") for part in match.groups()))
    found = re.search(r"^DEVNAME=(.+)$", content(os.path.join(_place(device), "uevent")), re.MULTILINE)
    return "/dev/" + found.group(1) if found is not None else ""


def on_file(status: os.stat_result) -> List[str]:
    """Return the loop devices that are backed by a regular file, and all devices on them."""
    return _closure(_loops((status.st_dev, status.st_ino)), _on)


def use(devices: Sequence[str], own: str = "") -> str:
    """Return how the first of `devices` that is in use is used, such as ``is mounted on /mnt``; "" if none is.

    A device that is only mounted read-only does not count: nothing writes to it. The device's name is added unless the
    device is `own`.
    """
    swaps, places = _swaps(), {mount.device: mount.place for mount in reversed(mounts()) if mount.writable}
    for each in devices:
        how = "is mounted on {}".format(places[each]) if each in places else ""
        how = "is used as swap" if each in swaps else how
        if how:
            return how if each == own else "{} ({})".format(how, name(each))
    return ""


def mounts() -> List[Mount]:
    """Return what is mounted, in the order of mounting; a file system on several devices has an entry for each."""
    pools = [_numbers(os.path.join(path, "*")) for path in glob.glob(os.path.join(SYS, "fs", "btrfs", "*", "devices"))]
    found = []
    for device, place, about in _mounted():
        devices = [device]
        if device.startswith("0:"):  # btrfs has its own number, and may be on several devices
            devices = _at(about[1])
            devices += [each for pool in pools if set(pool) & set(devices) for each in pool if each not in devices]
        writable = about[2].split(",")[0] == "rw"
        found += [Mount(each, place, writable) for each in devices]
    return found


def mount_points() -> List[str]:
    """Return where something is mounted, whether it is a device or not."""
    return [place for _device, place, _about in _mounted()]


def _mounted() -> Iterator[Tuple[str, str, List[str]]]:
    """Yield of each mounted file system the device number, the place, and its type, source and options."""
    for line in content(os.path.join(PROC, "self", "mountinfo")).split("\n"):
        mount, _, file_system = line.partition(" - ")
        fields, about = mount.split(" "), file_system.split(" ")
        if len(fields) >= 5 and len(about) >= 3:
            yield fields[2], _unescaped(fields[4]), about


def loops() -> "List[Tuple[str, os.stat_result]]":
    """Return the names of the loop devices, such as ``loop0``, each with the status of the file that backs it."""
    found = []
    for path in sorted(glob.glob(os.path.join(SYS, "block", "loop*", "loop", "backing_file"))):
        try:
            found.append((path.split(os.sep)[-3], os.stat(content(path))))
        except (OSError, ValueError):
            continue  # it was removed, or cannot be seen from here
    return found


def sectors(device: str) -> Optional[Sectors]:
    """Return what was read from and written to a device so far; None if the kernel does not report it.

    For devices whose sectors it does not count, such as memory disks, or if counting was switched off, the kernel still
    reports counters: they do not change.
    """
    try:
        counts = [int(word) for word in content(os.path.join(_place(device), "stat")).split()]
        return Sectors(counts[_READ], counts[_WRITTEN] + sum(counts[_DISCARDED : _DISCARDED + 1]))
    except (ValueError, IndexError):
        return None


def _closure(devices: List[str], following: Callable[[str], List[str]]) -> List[str]:
    found: List[str] = []
    left = list(devices)
    while left:
        device = left.pop(0)
        if device not in found:
            found.append(device)
            left += following(device)
    return found


def _place(device: str) -> str:
    return os.path.join(SYS, "dev", "block", device)


def _on(device: str) -> List[str]:
    return _partitions(device) + _numbers(os.path.join(_place(device), "holders", "*")) + _loops(device)


def _partitions(device: str) -> List[str]:
    found = sorted(glob.glob(os.path.join(_place(device), "*", "partition")))
    return [each for path in found for each in _numbers(os.path.dirname(path))]


def _numbers(pattern: str) -> List[str]:
    words = [content(os.path.join(path, "dev")) for path in sorted(glob.glob(pattern))]
    return [word for word in words if word]


def _loops(backing: Union[str, Tuple[int, int]]) -> List[str]:
    """Return the loop devices that are backed by a device (given by number) or by a file (by its device and inode)."""
    found = []
    for loop, status in loops():
        is_device = stat.S_ISBLK(status.st_mode)
        if backing == (number(status.st_rdev) if is_device else (status.st_dev, status.st_ino)):
            found += _numbers(os.path.join(SYS, "block", loop))
    return found


def _swaps() -> List[str]:
    return [each for line in content(os.path.join(PROC, "swaps")).split("\n")[1:] for each in _at(line.split(" ")[0])]


def _at(path: str) -> List[str]:
    """Return the number of the device at a path that the kernel has escaped; an empty list if it is not a device."""
    try:
        status = os.stat(_unescaped(path)) if path.startswith("/") else None
    except (OSError, ValueError):
        return []
    return [number(status.st_rdev)] if status is not None and stat.S_ISBLK(status.st_mode) else []


def _unescaped(path: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match.group(1), 8)), path)


def content(path: str) -> str:
    """Return the content of one of the kernel's files, without its last newline; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            text = os.fsdecode(file.read())
    except OSError:
        return ""
    return text[:-1] if text.endswith("\n") else text
