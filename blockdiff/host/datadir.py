"""Places that belong to a database because its data directory leads to them: links, mount points, ``.isl`` files.

Shipped to the host: standard library only, Python 3.6 or newer.

It is not enough to ask the database: it hides what the login has no privilege to see, and MariaDB does not report
tables that were not opened since it was started.
"""

import os
import re
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from blockdiff.host.sources import locate
from blockdiff.shared import wire
from blockdiff.shared.devices import mount_points, volume_beneath
from blockdiff.shared.errors import SourceError, printable

#: Suffixes of tables whose engines cannot roll back: MyISAM, Aria, CSV, Archive.
_UNLOGGED = (".MYI", ".MAI", ".CSV", ".ARZ")
#: Databases in which such tables belong to the database server itself.
_SYSTEM = ("mysql", "sys", "performance_schema", "information_schema")
#: Files directly in the data directory that are part of the data: of InnoDB, of Aria, and MySQL's data dictionary.
_FILES = re.compile(r"#?(ib|undo|aria_log|mysql\.ibd).*|.*\.(ibd|isl|ibu)")
#: Longest content of an ``.isl`` file, which says where InnoDB keeps a table, in bytes.
_PATH_LIMIT = 4096
#: The number of a device, and the index of the run's source beneath it (None: none): see `sources.locate`.
Place = Tuple[str, Optional[int]]


class Look(NamedTuple):
    """What was found below a data directory.

    `places` are paths in it, each with the path that it leads to. `unlogged` says whether there are tables, besides the
    database server's own, whose engines cannot roll back.
    """

    places: List[Tuple[str, str]]
    unlogged: bool


def volumes(places: List[Place]) -> Dict[str, str]:
    """Return the volumes, by device number, of the places that are not on a source of the run."""
    return {device: volume_beneath(device) for device, source in places if source is None and device}


def outside(directory: str, paths: List[str], shown: Callable[[str, Optional[int]], Place]) -> Dict[str, object]:
    """Return what the server should know about a data directory that is on one of the devices `paths`.

    If it is on none of them, the result is empty: the run does not read it, and the server learns nothing about it.
    `shown` returns what the server may know about a place (`Grant.place`). Raises `SourceError` like `look`.
    """
    device, index = locate(directory, paths)
    if index is None:
        return {}
    looked = look(directory)
    located = [(path, *locate(target, paths)) for path, target in looked.places]
    found = [(path, *shown(number, source)) for path, number, source in located if number not in ("", device)]
    return {
        "outside": [(*each, volume_beneath(each[1])) for each in found[: wire.MAX_OUTSIDE]],
        "unlogged": looked.unlogged,
    }


def look(directory: str) -> Look:
    """Look into a data directory and the directories of its databases; raises `SourceError` if that fails."""
    places = [(path, path) for path in mount_points() if path.startswith(os.path.realpath(directory) + "/")]
    unlogged = False
    try:
        for entry in _entries(directory):
            if not entry.is_dir():
                if _FILES.fullmatch(entry.name):
                    places += _leads_to(entry, directory)
                continue
            places += _leads_to(entry, directory)
            for inner in _entries(entry.path):
                places += _leads_to(inner, directory)
                unlogged = unlogged or (entry.name not in _SYSTEM and inner.name.endswith(_UNLOGGED))
    except OSError as error:
        raise SourceError(
            "cannot look into the database's directory {}: {}".format(printable(directory), error.strerror),
            "blockdiff must know what belongs to the database: let the login on the host read it",
        ) from error
    return Look(places, unlogged)


def _entries(directory: str) -> "Iterator[os.DirEntry[str]]":
    """Yield the entries of a directory; none if it no longer exists."""
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _leads_to(entry: "os.DirEntry[str]", directory: str) -> "List[Tuple[str, str]]":
    """Return the path of an entry and the path that it leads to; empty unless it is a link or an ``.isl`` file."""
    if entry.is_symlink():
        return [(entry.path, os.path.realpath(entry.path))]
    if not entry.name.endswith(".isl"):
        return []
    try:
        with open(entry.path, "rb") as file:
            target = os.fsdecode(file.read(_PATH_LIMIT).strip())
    except FileNotFoundError:
        return []
    return [(entry.path, os.path.join(directory, target))] if target else []
