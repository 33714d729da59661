"""A file as the target of a restore. It is written under a temporary name, and gets its own when it is complete."""

import errno
import os
import secrets
import shlex

from blockdiff.restore import inuse
from blockdiff.restore.offsetwriter import OffsetWriter
from blockdiff.shared.errors import TargetError, printable

_DEV = "/dev"

#: The errors of file systems that have no hard links, or cannot make more of them.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.EMLINK)


class FileTarget(OffsetWriter):
    """A new file: written under a temporary name beside it, and renamed when it is complete and durable.

    Zeros become holes. Without `force`, an existing file is refused, at the start and at the end. A context manager;
    without `finish`, nothing is left.
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
        except BaseException:  # a signal just after the file was created: `__exit__` will not be called
            self.close()
            raise
        return self

    def close(self) -> None:
        """Close the file, and remove its temporary name."""
        super().close()
        try:
            os.unlink(self._temporary)
        except OSError:
            pass  # it no longer exists, or cannot be removed: then the error that led here is the one to report

    def _exists(self) -> TargetError:
        return TargetError(f"{self._shown} exists", "--force replaces it once the new one is complete")

    def zero(self, offset: int, length: int) -> None:
        """Do nothing: what is not written in a new file is zero, and takes no space."""

    def check(self) -> None:
        """Raise `TargetError` if the file cannot be created, as far as that can be known without creating it."""
        if not self._force and os.path.lexists(self.path):
            raise self._exists()
        try:
            os.stat(self._directory)
        except OSError as error:
            raise self._failed("create", error) from error
        if not os.access(self._directory, os.W_OK | os.X_OK):
            raise TargetError(f"{printable(self._directory)} is not writable for this user", "restore to another place")

    def free_bytes(self) -> int:
        """Return how much space there is for the file, in bytes; raises `TargetError`."""
        try:
            found = os.statvfs(self._directory)
        except OSError as error:
            raise self._failed("create", error) from error
        return found.f_bavail * found.f_frsize

    def finish(self, image_size: int) -> None:
        """Set the size of the file, make it durable, and then give it its name; raises `TargetError`."""
        try:
            os.ftruncate(self._fd, image_size)
        except OSError as error:
            raise self._failed("write", error) from error
        self._sync()
        if self._force:
            self._warn_of_users()
        try:
            self._give_name()
        except FileExistsError as error:
            raise self._exists() from error
        except OSError as error:
            raise self._failed("create", error) from error
        self._sync_directory()

    def _warn_of_users(self) -> None:
        """Warn if a process has the old file open: what it writes there is lost, and it does not see the new file."""
        users = inuse.users_of_file(self.path)
        if users:
            self.warnings.append(
                f"{self._shown} is new, but the file that it replaced is still in use: {', '.join(users)}; "
                "what is written there is lost: restart it"
            )

    def _give_name(self) -> None:
        if self._force:
            os.rename(self._temporary, self.path)
            return
        try:
            os.link(self._temporary, self.path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            self._rename_to_new_name()
        else:
            os.unlink(self._temporary)

    def _rename_to_new_name(self) -> None:
        """Rename the file, where there are no hard links. A new, empty file makes sure that no other is replaced."""
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        try:
            os.rename(self._temporary, self.path)
        except BaseException:
            os.unlink(self.path)
            raise

    def _sync_directory(self) -> None:
        """Make the name durable, or warn. An error here is no failure: the file is complete and has its name."""
        try:
            fd = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            self.warnings.append(
                f"{self._shown} is complete, but its name may not survive a power cut: "
                f"cannot sync {printable(self._directory)}: {error.strerror}"
            )


def _cut(name: str) -> str:
    """Return the beginning of a file name, so that more can be added: a name has at most 255 bytes."""
    return os.fsencode(name)[:200].decode(errors="ignore")


def refuse_in_dev(path: str) -> None:
    """Raise `TargetError` if a file at `path` would be in ``/dev``, and so in memory.

    The user probably meant a device and gave a wrong name, or a logical volume that is not active.
    """
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
    """Return whether a file with this absolute path would be in the file system of ``/dev``."""
    directory = os.path.dirname(path)
    while not os.path.isdir(directory):
        directory = os.path.dirname(directory)
    dev = os.stat(_DEV).st_dev
    is_apart = dev != os.stat("/").st_dev
    return os.stat(directory).st_dev == dev and (is_apart or path.startswith(f"{_DEV}/"))
