"""A block device as the target of a restore. It is overwritten in place, so it is checked carefully before."""

import os
import time
from contextlib import suppress

from blockdiff.restore import contents, inuse
from blockdiff.restore.offsetwriter import OffsetWriter, write_zeros
from blockdiff.shared import process
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import ProcessError, TargetError, printable

#: How long udev may take to examine new devices, in seconds.
_UDEV_S = 10
#: How long blockdiff waits for another process that examines a new device, and the time between checks, in seconds.
SETTLE_S = 1.0
_LOOK_S = 0.05


def refuse_in_use(path: str) -> None:
    """Raise `TargetError`, which names all users, if the device at `path` is mounted or in use.

    It first waits a short time, because udev and other processes examine a new device.
    """
    if not _users(path):
        return
    _let_udev_finish()
    deadline = time.monotonic() + SETTLE_S
    while users := _users(path):
        if time.monotonic() > deadline:
            raise TargetError(
                f"{printable(path)} is in use: {', '.join(users)}", "unmount it, or stop what uses it, first"
            )
        time.sleep(_LOOK_S)


def _let_udev_finish() -> None:
    """Wait until udev has handled all new devices, if this machine has udev."""
    with suppress(ProcessError):
        process.run(["udevadm", "settle", f"--timeout={_UDEV_S}"], 2 * _UDEV_S, check=False)


def _users(path: str) -> list[str]:
    try:
        return inuse.users_of_device(os.stat(path).st_rdev)
    except OSError as error:
        raise TargetError(f"cannot look at {printable(path)}: {error.strerror}") from error


class DeviceTarget(OffsetWriter):
    """A block device, written in place. It is refused if it is mounted or in use (see `inuse`). A context manager.

    `image_size` is the number of bytes that must fit, None if it is not known yet. Without `force`, a device that
    contains data is refused. Zeros are written only over other bytes, so that a thin volume does not grow.
    """

    def __init__(self, path: str, force: bool, image_size: int | None) -> None:
        super().__init__(path)
        self._force = force
        self._image_size = image_size

    def __enter__(self) -> "DeviceTarget":
        refuse_in_use(self.path)
        if os.geteuid() != 0:
            self.notes.append(f"only root sees whether a process of another user has {self._shown} open")
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed("open", error) from error
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if self._image_size is not None and size < self._image_size:
                raise TargetError(
                    f"{self._shown} has {size} bytes ({shown_size(size)}), "
                    f"the image {self._image_size} ({shown_size(self._image_size)})",
                    "choose a device that is large enough",
                )
            if not self._force:
                self._refuse_data(size)
        except BaseException:
            self.close()
            raise
        return self

    def check(self) -> None:
        """Raise `TargetError` if the device would be refused; write nothing."""
        with self:
            pass

    def _refuse_data(self, size: int) -> None:
        try:
            found = contents.found_on(self.path, self._fd, size)
        except OSError as error:
            raise self._failed("read", error) from error
        if found is not None:
            raise TargetError(f"{self._shown} holds {found}", "--force overwrites it")

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`; raises `TargetError`."""
        self.is_changed = True
        super().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """Write zeros where the device has other bytes; raises `TargetError`."""
        self.is_changed = True
        try:
            write_zeros(self._fd, offset, length)
        except OSError as error:
            raise self._failed("write", error) from error

    def finish(self, image_size: int) -> None:
        """Make everything that was written durable; raises `TargetError`."""
        self._sync()
