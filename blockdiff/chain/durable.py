"""The file system operations that a chain's safety depends on. Only this module writes into a backup directory.

Every name is relative to one open directory. Failures become `StorageError` with the path and the reason. A failed
write, fsync or close is final, and the same descriptor is not used again: after an error the kernel may have dropped
the data, and may report success the next time.
"""

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType

from blockdiff.chain import owner, sharing
from blockdiff.format import checksum
from blockdiff.format.checksum import Checksum
from blockdiff.shared import locks
from blockdiff.shared.blocks import MAX_IMAGE_SIZE
from blockdiff.shared.errors import DamagedError, StorageError

_READ_SIZE = 1 << 20

_HINTS = {
    errno.ENOSPC: "free some space there; the chain is as it was before this run",
    errno.EDQUOT: "raise the quota; the chain is as it was before this run",
    errno.EACCES: "run as the user that owns the backups",
    errno.EPERM: "run as the user that owns the backups, on a file system with hard links",
    errno.ENOTSUP: "use a file system with hard links",
    errno.EROFS: "mount it writable",
    errno.ENAMETOOLONG: "choose a shorter NAME",
    errno.ELOOP: "a symbolic link has this name: move it away",
}


@contextmanager
def _named(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        hint = (owner.hint(path) if error.errno == errno.EACCES else None) or _HINTS.get(error.errno or 0)
        raise StorageError(f"cannot {action} {path}: {error.strerror or error}", hint) from error


class OutputFile:
    """A new file that is being written. It calculates the size and the checksum of its content. A context manager.

    `size` is in bytes; `checksum()`, by `algorithm`, is that of everything that was written so far.
    """

    def __init__(self, fd: int, path: str, algorithm: str = checksum.OF_OTHERS) -> None:
        self.path = path
        self.size = 0
        self._fd: int | None = fd
        self._checksum = Checksum(algorithm)

    def __enter__(self) -> "OutputFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it, if it is open."""
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

    def read_back(self) -> None:
        """Read what another process wrote through the descriptor, to set size and checksum; raises `StorageError`."""
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
        pass  # the file system has no modes; fsync reports other errors


def _open_file(name: str, extra_flags: int, directory_fd: int) -> int:
    """Open a file for reading. If it has become a FIFO, this does not wait for a writer."""
    flags = os.O_RDONLY | os.O_CLOEXEC | extra_flags
    try:
        fd = os.open(name, flags | os.O_NONBLOCK, dir_fd=directory_fd)
    except BlockingIOError:  # another process has a lease on the file, which the kernel ends after a while
        return os.open(name, flags, dir_fd=directory_fd)
    os.set_blocking(fd, True)
    return fd


def _not_a_file(path: str, mode: int) -> DamagedError:
    return DamagedError(
        f"{path} is {_kind(mode)}, not a regular file", "move it away, and restore the file from a copy"
    )


def _kind(mode: int) -> str:
    kinds = {stat.S_IFIFO: "a FIFO", stat.S_IFDIR: "a directory", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


class Directory:
    """An open directory. A context manager; raises `StorageError` if it is missing or cannot be opened.

    With `is_written`, the error for a missing directory also says how to create it.
    """

    def __init__(self, path: str, is_written: bool = False) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            hint = "is the disk mounted?" if error.errno == errno.ENOENT else None
            if hint is not None and is_written:
                hint += f" If the directory is new, create it: mkdir -p -m 700 {shlex.quote(path)}"
            raise StorageError(f"cannot open the backup directory {path}: {error.strerror}", hint) from error

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        try:
            os.close(self._fd)
        except OSError:
            pass  # nothing was written through it: what was reported stays true

    def refuse_others(self) -> None:
        """Raise `StorageError` if other users than the owner can write to the directory, or replace it."""
        with _named("look at", self.path):
            sharing.refuse_others(self.path)

    def refuse_read_only(self) -> None:
        """Raise `StorageError` if this user may not write to the directory, or the file system is read-only."""
        with _named("write to", self.path):
            if not os.access(self.path, os.W_OK | os.X_OK, effective_ids=True):
                read_only = os.fstatvfs(self._fd).f_flag & os.ST_RDONLY
                raise OSError(number := errno.EROFS if read_only else errno.EACCES, os.strerror(number))

    def refuse_root_file_system(self) -> None:
        """Raise `StorageError` if the directory is in the mount of ``/``: then no other disk is mounted there."""
        with Directory("/") as root:
            if self._mount() != root._mount():
                return
        raise StorageError(
            f"{self.path} is on the root file system: no disk is mounted there",
            "mount the disk for the backups; if they belong on the root file system, omit --mounted",
        )

    def _mount(self) -> str:
        """Return the kernel's identifier of the mount that the directory is in; a bind mount has its own."""
        with _named("look at", self.path), open(f"/proc/self/fdinfo/{self._fd}", encoding="ascii") as file:
            return next(line for line in file if line.startswith("mnt_id:"))

    def path_of(self, name: str) -> str:
        """Return the path of `name`, for messages."""
        return os.path.join(self.path, name)

    def names(self) -> list[str]:
        """Return the names in the directory, sorted."""
        with _named("list", self.path):
            return sorted(os.listdir(self._fd))

    def has(self, name: str) -> bool:
        """Return whether anything has this name, a symbolic link included."""
        return self._found(name) is not None

    def size_of(self, name: str) -> int | None:
        """Return the size of a file in bytes, None if there is none; raises what `open` raises."""
        found = self._found(name)
        return None if found is None else self._file(name, found).st_size

    def are_same(self, name: str, other: str) -> bool:
        """Return whether both names exist and belong to the same file."""
        found, others = self._found(name), self._found(other)
        return found is not None and others is not None and os.path.samestat(found, others)

    def modified(self, name: str) -> float:
        """Return when a file was last written to, in seconds since the epoch; raises what `open` raises."""
        found = self._found(name)
        if found is None:
            raise StorageError(f"cannot look at {self.path_of(name)}: {os.strerror(errno.ENOENT)}")
        return self._file(name, found).st_mtime

    def open(self, name: str) -> int:
        """Return a descriptor for reading.

        A symbolic link is followed if only the owner of the directory, root or this user can have made it. Raises
        `DamagedError` if the name is not that of a regular file, and `StorageError` if the file cannot be reached.
        """
        found = self._found(name)
        if found is None:
            raise StorageError(f"cannot open {self.path_of(name)}: {os.strerror(errno.ENOENT)}")
        return self._open(name, found)

    def _open(self, name: str, found: os.stat_result) -> int:
        self._file(name, found)
        with _named("open", self.path_of(name)):
            fd = _open_file(name, 0 if stat.S_ISLNK(found.st_mode) else os.O_NOFOLLOW, self._fd)
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode):  # it was replaced since it was `found`
            os.close(fd)
            raise _not_a_file(self.path_of(name), mode)
        return fd

    def _found(self, name: str) -> os.stat_result | None:
        """Return the status of what has this name, without following a link; None if nothing has it."""
        try:
            return os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(f"cannot look at {self.path_of(name)}: {error.strerror}") from error

    def _file(self, name: str, found: os.stat_result) -> os.stat_result:
        """Return the status of the regular file that was `found`, or that the link that was found leads to."""
        file = self._followed(name, found) if stat.S_ISLNK(found.st_mode) else found
        if not stat.S_ISREG(file.st_mode):
            raise _not_a_file(self.path_of(name), file.st_mode)
        return file

    def _followed(self, name: str, link: os.stat_result) -> os.stat_result:
        """Return the status of what a symbolic link leads to.

        Raises `StorageError` if another user may have made the link, or what it leads to does not exist.
        """
        path = self.path_of(name)
        with _named("look at", path):
            owners = (0, os.geteuid(), os.fstat(self._fd).st_uid)
            try:
                sharing.refuse_others(self.path)
            except StorageError as error:
                raise StorageError(
                    f"{path} is a symbolic link, and is not followed: {error.message}", error.hint
                ) from error
        if link.st_uid not in owners:
            raise StorageError(
                f"{path} is a symbolic link that belongs to another user (UID {link.st_uid}), and is not followed",
                "put the file itself there, or make the link as the owner of the directory",
            )
        try:
            return os.stat(name, dir_fd=self._fd)
        except OSError as error:
            raise StorageError(
                f"{path} is a symbolic link, and what it leads to cannot be reached: {error.strerror}",
                "is the disk mounted that it leads to?",
            ) from error

    def read(self, name: str, limit: int = MAX_IMAGE_SIZE) -> bytes | None:
        """Return the content of a small file, at most `limit` bytes of it; None if it does not exist."""
        found = self._found(name)
        if found is None:
            return None
        with _named("read", self.path_of(name)), os.fdopen(self._open(name, found), "rb") as file:
            return file.read(limit)

    def open_lock(self, name: str) -> int:
        """Return a descriptor of the file `name`, for a lock on it; the file is created if it does not exist."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        with _named("open", self.path_of(name)):
            try:
                fd = self._new(name, flags | os.O_EXCL)
            except FileExistsError:
                fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        if not stat.S_ISREG(mode := os.fstat(fd).st_mode):
            os.close(fd)
            raise StorageError(f"{self.path_of(name)} is {_kind(mode)}, not a regular file", "move it away")
        return fd

    def is_locked(self, name: str) -> bool:
        """Return whether a process holds a lock on a file, according to the system. It does not take the lock."""
        found = self._found(name)
        return found is not None and bool(locks.holders(found.st_ino, "FLOCK"))

    def create(self, name: str, algorithm: str = checksum.OF_OTHERS) -> OutputFile:
        """Create a file of mode 0600, with a checksum by `algorithm`; raises `StorageError` if the name exists.

        If root creates a file or a lock, it belongs to the owner of the directory.
        """
        with _named("create", self.path_of(name)):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            return OutputFile(self._new(name, flags), self.path_of(name), algorithm)

    def _new(self, name: str, flags: int) -> int:
        fd = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            owner.give(fd, self._fd)
        except OSError:
            os.close(fd)
            os.unlink(name, dir_fd=self._fd)
            raise
        return fd

    def link(self, name: str, new_name: str) -> None:
        """Give a file a second name; raises `StorageError` if that exists: a link never replaces a file."""
        with _named("create", self.path_of(new_name)):
            os.link(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)

    def check_abilities(self, name: str, spare_name: str) -> None:
        """Raise `StorageError` if the file system lacks what a commit needs: hard links, and fsync of a directory.

        For a moment, the file `name` also has the name `spare_name`, which must not exist.
        """
        with _named("make a hard link in", self.path):
            try:
                os.link(name, spare_name, src_dir_fd=self._fd, dst_dir_fd=self._fd, follow_symlinks=False)
            except BaseException:
                with suppress(OSError):  # the error that led here is the one to report
                    os.unlink(spare_name, dir_fd=self._fd)
                raise
        self.unlink(spare_name)
        self.sync()

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file; it replaces a file that has the new name."""
        with _named("rename", self.path_of(name)):
            os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def unlink(self, name: str) -> None:
        """Remove a name, if it exists."""
        with _named("remove", self.path_of(name)):
            try:
                os.unlink(name, dir_fd=self._fd)
            except FileNotFoundError:
                pass

    def sync(self) -> None:
        """Make every link, rename and removal so far durable."""
        with _named("sync", self.path):
            os.fsync(self._fd)
