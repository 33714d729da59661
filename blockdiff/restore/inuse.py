"""What uses a device or a file of this machine: mounts, volumes on top of it, loop devices, processes.

Linux refuses to open a device exclusively if it is mounted, used as swap, or a part of a volume. It does not refuse if
a loop device or a process uses it, such as a virtual machine. So these are looked for here. Only root sees all
processes.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator

from blockdiff.shared import devices, process
from blockdiff.shared.errors import ProcessError, printable

_DMSETUP_TIMEOUT_S = 10.0

_IsIt = Callable[[os.stat_result], bool]


def users_of_device(number: int) -> list[str]:
    """Return what uses the block device with this number, one of its partitions, or the disk that it is a partition of.

    Each is a phrase that follows "in use:". The list is empty if nothing uses them that this user can see.
    """
    numbers = devices.disk_of(devices.number(number))

    def is_it(status: os.stat_result) -> bool:
        return stat.S_ISBLK(status.st_mode) and devices.number(status.st_rdev) in numbers

    found = [
        *(f"it is mounted on {printable(mount.place)}" for mount in devices.mounts() if mount.device in numbers),
        *(f"{_name(holder)} is on it" for each in numbers for holder in _listed(_device(each) + "/holders")),
        *(f"the loop device /dev/{name} is on it" for name in _loop_devices(is_it)),
        *_processes(is_it),
    ]
    return found or _others(number)


def users_of_file(path: str) -> list[str]:
    """Return the processes that have the file open, as phrases like those of `users_of_device`; empty if none has."""
    return list(_processes(_is_one_of([path])))


def writers_of_files(paths: Iterable[str]) -> list[str]:
    """Return the processes that have one of the files open for writing; otherwise like `users_of_file`."""
    return list(_processes(_is_one_of(paths), only_writers=True))


def loop_device_of(path: str) -> str | None:
    """Return the path of a loop device on the file, None if there is none."""
    return next((f"/dev/{name}" for name in _loop_devices(_is_one_of([path]))), None)


def _is_one_of(paths: Iterable[str]) -> _IsIt:
    """Return a function that recognises the files at `paths`. Those that no longer exist are ignored."""
    statuses = []
    for path in paths:
        try:
            statuses.append(os.stat(path))
        except OSError:
            continue
    return lambda found: any(os.path.samestat(found, status) for status in statuses)


def _device(number: str) -> str:
    return f"{devices.SYS}/dev/block/{number}"


def _name(device: str) -> str:
    """Return the path of a device, by the name that device-mapper (for LVM or others) has for it, if it has one."""
    name = devices.content(f"{devices.SYS}/block/{device}/dm/name")
    return f"/dev/mapper/{printable(name)}" if name else f"/dev/{device}"


def _loop_devices(is_it: _IsIt) -> Iterator[str]:
    """Yield the names of the loop devices on a file or device that `is_it` recognises."""
    yield from (name for name, status in devices.loops() if is_it(status))


def _processes(is_it: _IsIt, only_writers: bool = False) -> Iterator[str]:
    """Yield the other processes that have something open that `is_it` recognises; with `only_writers`, for writing."""
    for pid in sorted(int(name) for name in _listed(devices.PROC) if name.isdecimal()):
        if pid != os.getpid() and any(map(is_it, _opened(f"{devices.PROC}/{pid}", only_writers))):
            name = devices.content(f"{devices.PROC}/{pid}/comm") or "a process"
            yield f"{printable(name)} (process {pid}) has it open"


def _opened(process_directory: str, only_writers: bool) -> Iterator[os.stat_result]:
    """Yield the status of everything with a path that a process has open: no sockets, pipes and the like."""
    for name in _listed(f"{process_directory}/fd"):
        path = f"{process_directory}/fd/{name}"
        try:
            if os.readlink(path).startswith("/") and not (only_writers and _only_reads(process_directory, name)):
                yield os.stat(path)
        except OSError:
            continue  # it has been closed


def _only_reads(process_directory: str, name: str) -> bool:
    flags = re.search(r"^flags:\s*([0-7]+)$", devices.content(f"{process_directory}/fdinfo/{name}"), re.MULTILINE)
    return flags is not None and int(flags[1], 8) & os.O_ACCMODE == os.O_RDONLY


def _others(number: int) -> list[str]:
    """Return the users of a volume that only device-mapper knows, as a phrase: it also counts those in the kernel."""
    program = shutil.which("dmsetup", path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")
    if program is None or not os.path.exists(_device(devices.number(number)) + "/dm"):
        return []
    place = ["-j", str(os.major(number)), "-m", str(os.minor(number))]
    try:
        said = process.run([program, "info", "-c", "--noheadings", "-o", "open", *place], _DMSETUP_TIMEOUT_S).stdout
    except ProcessError:
        return []  # not as root
    count = said.strip().decode("ascii", "replace")
    if not count.isdecimal() or int(count) == 0:
        return []
    return [f"`dmsetup info` counts {count} users, but no process of this system has it open"]


def _listed(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []  # the process has ended, or this user may not see it
