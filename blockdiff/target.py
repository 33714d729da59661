"""What an image is restored to: a new file, or a block device."""

import os
import shlex
import stat

from blockdiff import inuse
from blockdiff.devicetarget import DeviceTarget
from blockdiff.errors import TargetError, printable
from blockdiff.filetarget import FileTarget

_DEV = "/dev"


def open_target(path: str, force: bool, image_size: int | None) -> FileTarget | DeviceTarget:
    """Return the target at `path`: a block device that is there, or else a file; raises `TargetError`.

    A restore to a device through a symbolic link, such as ``/dev/vg/lv``, writes to the device. A file that is mounted
    through a loop device is refused even with `force`: to replace it would not reach who uses it. So is any file under
    ``/dev``: that would be in memory, and is a device whose name is wrong, or a volume that is not active.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        _refuse_file_in_dev(path)
        return FileTarget(path, force)
    except OSError as error:
        raise TargetError(f"cannot look at {printable(path)}: {error.strerror}") from error
    if stat.S_ISBLK(mode):
        return DeviceTarget(path, force, image_size)
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise TargetError(f"{printable(path)} is {what}", "name the file or device to restore to")
    _refuse_file_in_dev(path)
    loop_device = inuse.loop_device_of(path)
    if loop_device is not None:
        raise TargetError(
            f"{printable(path)} is in use by a loop device, {loop_device}",
            f"detach it first (losetup -d {loop_device}), or name another file",
        )
    return FileTarget(path, force)


def _refuse_file_in_dev(path: str) -> None:
    real = os.path.realpath(path)
    if not _is_in_dev(real):
        return
    group, _, volume = real.removeprefix(f"{_DEV}/").partition("/")
    is_volume = volume and "/" not in volume and group not in ("block", "disk", "mapper")
    what = shlex.quote(f"{group}/{volume}") if is_volume else "GROUP/VOLUME"
    raise TargetError(
        f"{printable(path)} is not a block device, and a file under {_DEV} would be in memory",
        f"`lsblk` lists the devices; a logical volume must be active: lvchange -a y {what}",
    )


def _is_in_dev(path: str) -> bool:
    """Return whether a file of this absolute path would be in the file system that the devices are in."""
    directory = os.path.dirname(path)
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    dev = os.stat(_DEV).st_dev
    is_apart = dev != os.stat("/").st_dev
    return os.stat(directory).st_dev == dev and (is_apart or path.startswith(f"{_DEV}/"))
