"""The target of a restore: a new file, or a block device."""

import os
import stat

from blockdiff.restore import inuse
from blockdiff.restore.devicetarget import DeviceTarget
from blockdiff.restore.filetarget import FileTarget, refuse_in_dev
from blockdiff.shared.errors import TargetError, printable


def open_target(path: str, force: bool, image_size: int | None) -> FileTarget | DeviceTarget:
    """Return the target at `path`: an existing block device, or else a file; raises `TargetError`.

    If `path` is a symbolic link to a device, such as ``/dev/vg/lv``, the restore writes to the device. A file that a
    loop device uses is refused even with `force`: the loop device would still use the old file. So is any file under
    ``/dev``: it would be in memory, and the user probably meant a device.
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
