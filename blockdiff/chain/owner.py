"""Whose a chain is: root may run a backup in another user's directory, and what it makes there becomes that user's."""

import os
import pwd
import shlex


def give(fd: int, directory_fd: int) -> None:
    """Give a new file that root has made to the owner of its directory, who could not continue the chain otherwise.

    Only for a file that is new for certain: the owner of the directory can have planted any other. Raises `OSError`
    if the file system does not let us.
    """
    directory = os.fstat(directory_fd)
    if os.geteuid() == 0 and directory.st_uid != 0 and os.fstat(fd).st_uid == 0:
        os.fchown(fd, directory.st_uid, directory.st_gid)


def hint(path: str) -> str | None:
    """Return what to do if we may not reach `path`, because it is another user's in a directory of ours."""
    try:
        file, directory = os.lstat(path), os.stat(os.path.dirname(path) or ".")
    except OSError:
        return None
    if directory.st_uid != os.geteuid() or file.st_uid == directory.st_uid:
        return None
    place = shlex.quote(os.path.dirname(path) or ".")
    return f"it belongs to {_name(file.st_uid)}; as root: chown -R {_name(directory.st_uid)} {place}"


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
