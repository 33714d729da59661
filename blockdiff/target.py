"""What an image is restored to: a new file under a temporary name, or a block device."""

import errno
import os
import secrets
import stat
from types import TracebackType

from blockdiff.errors import TargetError, printable

#: Looked at to tell whether a device holds data, in bytes: every file system and partition table begins within.
_LOOK_BYTES = 1 << 20
_ZEROS = bytes(1 << 20)


class _Target:
    """What files and devices have in common: writes at offsets, by any thread. A context manager."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._shown = printable(path)
        self._fd = -1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def write(self, offset: int, data: memoryview) -> None:
        """Write `data` at `offset`; raises `TargetError`."""
        try:
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed("write", error) from error

    def _failed(self, action: str, error: OSError) -> TargetError:
        return TargetError(f"cannot {action} {self._shown}: {error.strerror}", _HINTS.get(error.errno or 0))

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise self._failed("write", error) from error


_HINTS = {
    errno.ENOSPC: "free some space there, or restore to another place",
    errno.EBUSY: "it is mounted or in use: unmount it first",
    errno.EFBIG: "the file system there cannot hold a file of this size",
    errno.ENOENT: "create the directory first",
}


class FileTarget(_Target):
    """A new file: written under a temporary name beside it, and renamed when it is complete and durable.

    Zeros are holes. Without `force` an existing file is refused, at the start and at the end. A context manager;
    without `finish` nothing of it stays.
    """

    def __init__(self, path: str, force: bool) -> None:
        super().__init__(path)
        self._force = force
        directory, name = os.path.split(path)
        self._directory = directory or "."
        self._temporary = os.path.join(self._directory, f".{_cut(name)}.{secrets.token_hex(4)}.tmp")

    def __enter__(self) -> "FileTarget":
        if not self._force and os.path.lexists(self.path):
            raise self._exists()
        try:
            self._fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise self._failed("create", error) from error
        except BaseException:  # a signal that came just now: nobody calls __exit__ for us
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        super().__exit__(kind, error, tb)
        try:
            os.unlink(self._temporary)
        except OSError:
            pass  # it is gone already; or it stays, and the error that brought us here is the one to tell

    def _exists(self) -> TargetError:
        return TargetError(f"{self._shown} exists", "--force replaces it once the new one is complete")

    def zero(self, offset: int, length: int) -> None:
        """Nothing to do: what is not written in a new file is zero, and takes no room."""

    def finish(self, image_size: int) -> None:
        """Give the file its size and, when it is durable, its name; raises `TargetError`."""
        try:
            os.ftruncate(self._fd, image_size)
        except OSError as error:
            raise self._failed("write", error) from error
        self._sync()
        try:
            if self._force:
                os.rename(self._temporary, self.path)
            else:
                os.link(self._temporary, self.path)
                os.unlink(self._temporary)
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise self._failed("create", error) from error
        self._sync_directory()

    def _sync_directory(self) -> None:
        fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            raise self._failed("write", error) from error
        finally:
            os.close(fd)


def _cut(name: str) -> str:
    """Return what of a file name leaves room for more: a name has at most 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


class DeviceTarget(_Target):
    """A block device, written in place. The system itself refuses one that is mounted or in use (`O_EXCL`).

    `image_size` in bytes is what must fit, None where it is not known yet. Without `force` a device that holds data is
    refused. A context manager.
    """

    def __init__(self, path: str, force: bool, image_size: int | None) -> None:
        super().__init__(path)
        self._force = force
        self._image_size = image_size

    def __enter__(self) -> "DeviceTarget":
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed("open", error) from error
        try:
            size = os.lseek(self._fd, 0, os.SEEK_END)
            if self._image_size is not None and size < self._image_size:
                raise TargetError(
                    f"{self._shown} has {size} bytes, the image {self._image_size}",
                    "choose a device that is large enough",
                )
            if not self._force and os.pread(self._fd, _LOOK_BYTES, 0).strip(b"\0"):
                raise TargetError(f"{self._shown} holds data", "--force overwrites it")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def zero(self, offset: int, length: int) -> None:
        """Write zeros; raises `TargetError`."""
        for start in range(offset, offset + length, len(_ZEROS)):
            self.write(start, memoryview(_ZEROS)[: min(len(_ZEROS), offset + length - start)])

    def finish(self, image_size: int) -> None:
        """Make what was written durable; raises `TargetError`."""
        self._sync()


def open_target(path: str, force: bool, image_size: int | None) -> "FileTarget | DeviceTarget":
    """Return the target at `path`: a block device that is there, or else a file; raises `TargetError`.

    A restore to a device through a symbolic link, such as ``/dev/vg/lv``, writes to the device. A file that is mounted
    through a loop device is refused even with `force`: to replace it would not reach who uses it.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return FileTarget(path, force)
    except OSError as error:
        raise TargetError(f"cannot look at {printable(path)}: {error.strerror}") from error
    if stat.S_ISBLK(mode):
        return DeviceTarget(path, force, image_size)
    if not stat.S_ISREG(mode):
        what = "a directory" if stat.S_ISDIR(mode) else "neither a file nor a block device"
        raise TargetError(f"{printable(path)} is {what}", "name the file or device to restore to")
    if _behind_loop_device(path):
        raise TargetError(
            f"{printable(path)} is in use by a loop device", "detach it first (losetup -d), or name another file"
        )
    return FileTarget(path, force)


def _behind_loop_device(path: str) -> bool:
    """Return whether a loop device of this machine uses the file."""
    block = "/sys/block"
    try:
        names = [name for name in os.listdir(block) if name.startswith("loop")]
    except OSError:
        return False
    for name in names:
        try:
            with open(os.path.join(block, name, "loop", "backing_file"), "rb") as file:
                backing = file.read().rstrip(b"\n")
            if os.path.samefile(backing, path):
                return True
        except OSError:
            continue  # a loop device that is free, or whose file is gone
    return False
