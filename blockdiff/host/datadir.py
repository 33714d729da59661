"""What belongs to a database by what is in its data directory, and may lie elsewhere: links and mount points.

Shipped to the host: standard library only, Python 3.6 or newer.

The server's own word is not enough: a login does not learn what it may not see, and of tables that nobody has opened
since the start MariaDB says nothing.
"""

import os
import re
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

from blockdiff.host.sources import locate
from blockdiff.shared import wire
from blockdiff.shared.devices import mount_points, volume_beneath
from blockdiff.shared.errors import SourceError, printable

#: Tables of engines that do not undo what was not committed: MyISAM, Aria, CSV, Archive.
_UNLOGGED = (".MYI", ".MAI", ".CSV", ".ARZ")
#: Databases whose such tables belong to the server itself.
_SYSTEM = ("mysql", "sys", "performance_schema", "information_schema")
#: Files that are in the data directory itself, and are a part of the data: of InnoDB, Aria, and all engines.
_FILES = re.compile(r"#?(ib|undo|aria_log|mysql\.ibd).*|.*\.(ibd|isl|ibu)")
#: Longest content of a file that says where InnoDB keeps a table.
_PATH_LIMIT = 4096
#: The number of a device, and which source of the run is beneath it: see `sources.locate`.
Place = Tuple[str, Optional[int]]


class Look(NamedTuple):
    """What was found below a data directory.

    `places` are paths as they are seen there, and what they lead to; `unlogged` says whether there are tables, besides
    the server's own, of engines that do not undo what was not committed.
    """

    places: List[Tuple[str, str]]
    unlogged: bool


def volumes(places: List[Place]) -> Dict[str, str]:
    """Return the volumes, by the numbers of their devices, of the places that are on no source of the run."""
    return {device: volume_beneath(device) for device, source in places if source is None and device}


def outside(directory: str, paths: List[str], shown: Callable[[str, Optional[int]], Place]) -> Dict[str, object]:
    """Return what the server should know of a data directory, where that is on one of the devices `paths`.

    The server cannot read what is not there, and does not learn of it; `shown` is what it may know of where a
    place is. Raises `SourceError` as `look`.
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
    """Look at a data directory and the directories of its databases; raises `SourceError` if that is not allowed."""
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
    """Yield what is in a directory; nothing if it no longer exists."""
    try:
        with os.scandir(directory) as entries:
            yield from entries
    except FileNotFoundError:
        return


def _leads_to(entry: "os.DirEntry[str]", directory: str) -> "List[Tuple[str, str]]":
    """Return an entry that leads elsewhere, with the place: a link, or a file of InnoDB that names one."""
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
