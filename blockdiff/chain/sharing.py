"""Which other users can replace files in a directory: those who may write to it, or to a directory on its path."""

import errno
import grp
import os
import pwd
import shlex
import stat
from collections.abc import Iterator

from blockdiff.shared.errors import StorageError, printable

#: How many symbolic links are followed on the path to a directory; the kernel has the same limit.
_MAX_LINKS = 40


def refuse_others(path: str) -> None:
    """Raise `StorageError` if other users than its owner may write to the directory `path`, or replace it.

    Directories on its path must not be writable for others, with two exceptions. In one with the sticky bit, such as
    /tmp, an entry is safe if it belongs to this user or to root. And a group may write if it is root's, or the owner's
    private group, which has the owner's name on many systems. Raises `OSError` if a directory cannot be reached.
    """
    found = os.stat(path)
    if _is_shared(found):
        raise StorageError(
            f"other users can write to the backup directory {printable(path)} (mode {_mode(found)}),"
            " and so replace backups",
            _hint(os.path.abspath(path), found),
        )
    for directory, name in _steps(path):
        _check(directory, os.path.join(directory, name))


def _check(directory: str, entry: str) -> None:
    """Raise `StorageError` if other users can replace `entry`, which is in `directory`."""
    found = os.stat(directory)
    if not _is_shared(found) or _is_of_own_group(found):
        return
    place = printable(entry)
    if not found.st_mode & stat.S_ISVTX:
        raise StorageError(
            f"other users can write to {printable(directory)} (mode {_mode(found)}),"
            f" and so replace {place} and its backups",
            _hint(directory, found),
        )
    owner = os.lstat(entry).st_uid
    if owner not in (0, os.geteuid()):
        raise StorageError(
            f"{place} belongs to another user (UID {owner}), who can replace it and its backups",
            "keep backups in your own directory",
        )


def _hint(directory: str, found: os.stat_result) -> str:
    """Return what to do. A directory with the sticky or setgid bit is shared on purpose, and should stay so."""
    if found.st_mode & (stat.S_ISVTX | stat.S_ISGID) or found.st_uid != os.geteuid():
        return "that directory is shared: use your own, such as /var/backup (mkdir -m 700 /var/backup)"
    return f"chmod go-w {shlex.quote(printable(directory))}"


def _is_shared(found: os.stat_result) -> bool:
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _is_of_own_group(found: os.stat_result) -> bool:
    """Return whether others cannot write to a directory, and its group is root's or has the name of its owner."""
    if found.st_mode & stat.S_IWOTH:
        return False
    try:
        return found.st_gid == 0 or grp.getgrgid(found.st_gid).gr_name == pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        return False


def _mode(found: os.stat_result) -> str:
    return f"{stat.S_IMODE(found.st_mode):04o}"


def _steps(path: str) -> Iterator[tuple[str, str]]:
    """Yield each directory on the path to `path`, and the name that is looked up in it."""
    current, links = "/", 0
    left = os.path.join(os.getcwd(), path).split("/")[::-1]
    while left:
        name = left.pop()
        if name == "..":
            current = os.path.dirname(current)
        if name in ("", ".", ".."):
            continue
        yield current, name
        entry = os.path.join(current, name)
        if not os.path.islink(entry):
            current = entry
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), entry)
        target = os.readlink(entry)
        left += target.split("/")[::-1]
        if target.startswith("/"):
            current = "/"
