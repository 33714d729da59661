"""What an image is restored to: a new file, or a block device."""

import os
import stat

from blockdiff.restore import inuse
from blockdiff.restore.devicetarget import DeviceTarget
from blockdiff.restore.filetarget import FileTarget, refuse_in_dev
from blockdiff.shared.errors import TargetError, printable


def open_target(path: str, force: bool, image_size: int | None) -> FileTarget | DeviceTarget:
    """Return the target at `path`: a block device that is there, or else a file; raises `TargetError`.

    A restore to a device through a symbolic link, such as ``/dev/vg/lv``, writes to the device. A file that is mounted
    through a loop device is refused even with `force`: to replace it would not reach who uses it. So is any file under
    ``/dev``: that would be in memory, and is a device whose name is wrong, or a volume that is not active.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        refuse_in_dev(path)
        return FileTarget(path, force)
    except OSError as error:
        raise TargetError(f"cannot look at {printable(path)}: {error.strerror}") from error
    if stat.S_ISBLK(mode):
        return DeviceTarget(path, force, image_size)
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise TargetError(f"{printable(path)} is {what}", "name the file or device to restore to")
    refuse_in_dev(path)
    loop_device = inuse.loop_device_of(path)
    if loop_device is not None:
        raise TargetError(
            f"{printable(path)} is in use by a loop device, {loop_device}",
            f"detach it first (losetup -d {loop_device}), or name another file",
        )
    return FileTarget(path, force)
