"""The file system operations that a chain's safety rests on: the only place that writes into a backup directory.

Every name is relative to one open directory. Failures become `StorageError` with the path and the reason. A failed
write, fsync or close is final: the same descriptor is never tried again, because after an error the kernel may have
dropped the data and report success the next time.
"""

import errno
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from blockdiff import checksum, sharing
from blockdiff.blocks import MAX_IMAGE_SIZE
from blockdiff.checksum import Checksum
from blockdiff.errors import StorageError

_READ_SIZE = 1 << 20

_HINTS = {
    errno.ENOSPC: "free some space there; the chain is as it was before this run",
    errno.EDQUOT: "raise the quota; the chain is as it was before this run",
    errno.EACCES: "run as the user that owns the backups",
    errno.EPERM: "run as the user that owns the backups, on a file system with hard links",
    errno.ENOTSUP: "use a file system with hard links",
    errno.EROFS: "mount it writable",
    errno.ENAMETOOLONG: "choose a shorter NAME",
}


@contextmanager
def _named(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = _HINTS.get(error.errno or 0)
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}", hint) from error


class OutputFile:
    """A new file that is being written; counts what is written to it, and knows its checksum. A context manager.

    `size` is in bytes; `checksum()` is that of everything written so far, by `algorithm`.
    """

    def __init__(self, fd: int, path: str, algorithm: str = checksum.OF_OTHERS) -> None:
        self.path = path
        self.size = 0
        self._fd: int | None = fd
        self._checksum = Checksum(algorithm)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            os.close(fd)

    def write(self, data: bytes) -> None:
        """Append `data`, all of it; raises `StorageError`."""
        assert self._fd is not None, "written to after it was finished"
        view = memoryview(data)
        with _named("write", self.path):
            while view:
                view = view[os.write(self._fd, view) :]
        self._checksum.update(data)
        self.size += len(data)

    def fileno(self) -> int:
        """Return the descriptor, for a child process to write to."""
        assert self._fd is not None, "finished already"
        return self._fd

    def take_in(self) -> None:
        """Count what another process has written through the descriptor, with its checksum; raises `StorageError`."""
        self._checksum, self.size = Checksum(self._checksum.algorithm), 0
        with _named("read", self.path):
            while data := os.pread(self.fileno(), _READ_SIZE, self.size):
                self._checksum.update(data)
                self.size += len(data)

    def finish(self, mode: int = 0o400) -> None:
        """Give the file its mode, make it durable, and close it; raises `StorageError`."""
        assert self._fd is not None, "finished twice"
        fd, self._fd = self._fd, None
        with _named("write", self.path):
            try:
                _change_mode(fd, mode)
                os.fsync(fd)
            finally:
                os.close(fd)

    def checksum(self) -> str:
        """Return the checksum of what was written."""
        return self._checksum.text()


def _change_mode(fd: int, mode: int) -> None:
    try:
        os.fchmod(fd, mode)
    except OSError:
        pass  # a file system without modes; whatever else is wrong, fsync tells


class Directory:
    """An open directory. A context manager; raises `StorageError` where it is missing or cannot be opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            hint = f"create it first: mkdir -p -m 700 {shlex.quote(path)}" if error.errno == errno.ENOENT else None
            raise StorageError(f"cannot open the backup directory {path}: {error.strerror}", hint) from error

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            os.close(self._fd)
        except OSError:
            pass  # nothing was written through it: what was reported stays true

    def refuse_others(self) -> None:
        """Raise `StorageError` where others than the owner may write to the directory, or replace it."""
        with _named("look at", self.path):
            sharing.refuse_others(self.path)

    def path_of(self, name: str) -> str:
        """Return the path of `name`, for messages."""
        return os.path.join(self.path, name)

    def names(self) -> list[str]:
        """Return the names in the directory, sorted."""
        with _named("list", self.path):
            return sorted(os.listdir(self._fd))

    def size_of(self, name: str) -> int | None:
        """Return the size of a file in bytes, None where there is none."""
        try:
            return os.stat(name, dir_fd=self._fd).st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot look at {self.path_of(name)}: {error.strerror}") from error

    def are_same(self, name: str, other: str) -> bool:
        """Return whether both names are there and are those of one file."""
        try:
            return os.path.samestat(os.stat(name, dir_fd=self._fd), os.stat(other, dir_fd=self._fd))
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StorageError(f"cannot look at {self.path_of(name)}: {error.strerror}") from error

    def modified(self, name: str) -> float:
        """Return when a file was last written to, in seconds since the epoch."""
        with _named("look at", self.path_of(name)):
            return os.stat(name, dir_fd=self._fd).st_mtime

    def open(self, name: str) -> int:
        """Return a descriptor for reading."""
        with _named("open", self.path_of(name)):
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=self._fd)

    def read(self, name: str, limit: int = MAX_IMAGE_SIZE) -> bytes | None:
        """Return the content of a small file, at most `limit` bytes of it; None where there is none."""
        if self.size_of(name) is None:
            return None
        with _named("read", self.path_of(name)), os.fdopen(self.open(name), "rb") as file:
            return file.read(limit)

    def open_lock(self, name: str) -> int:
        """Return a descriptor of the file `name` to hold a lock on, made where there is none."""
        with _named("open", self.path_of(name)):
            return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self._fd)

    def create(self, name: str, algorithm: str = checksum.OF_OTHERS) -> OutputFile:
        """Make a new file of mode 0600, with a checksum by `algorithm`; `StorageError` where the name is taken."""
        with _named("create", self.path_of(name)):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            return OutputFile(os.open(name, flags, 0o600, dir_fd=self._fd), self.path_of(name), algorithm)

    def link(self, name: str, new_name: str) -> None:
        """Give a file a second name; raises `StorageError` where that is taken: nothing is ever overwritten."""
        with _named("create", self.path_of(new_name)):
            os.link(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)

    def rename(self, name: str, new_name: str) -> None:
        """Move a file over whatever bears the new name."""
        with _named("rename", self.path_of(name)):
            os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        """Remove a name; one that is gone already is fine."""
        with _named("remove", self.path_of(name)):
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                pass

    def sync(self) -> None:
        """Make every link, rename and removal so far durable."""
        with _named("sync", self.path):
            os.fsync(self._fd)
