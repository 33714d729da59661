"""The owner of a chain: if root runs a backup in another user's directory, new files there belong to that user."""

import os
import pwd
import shlex


def give(fd: int, directory_fd: int) -> None:
    """Give a new file that root has created to the owner of its directory, who otherwise could not continue the chain.

    Use it only for a file that is certainly new: any other may be one that the owner of the directory put there. Raises
    `OSError` if the file system refuses.
    """
    directory = os.fstat(directory_fd)
    if os.geteuid() == 0 and directory.st_uid != 0 and os.fstat(fd).st_uid == 0:
        os.fchown(fd, directory.st_uid, directory.st_gid)


def hint(path: str) -> str | None:
    """Return a hint if `path` cannot be opened because another user owns it, in a directory of this user; else None."""
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
