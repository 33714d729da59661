"""Checks of a volume before writers are stopped: what it is, and whether a snapshot of it can be made.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
import re
import stat
from typing import List

from blockdiff.host import lvs
from blockdiff.host.lvs import LateError, MissingError, Volume
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import ProcessError, SourceError, printable

#: No snapshot is made in a thin pool whose data or metadata are full to this level, in percent.
POOL_LIMIT_PERCENT = 95.0
#: The snapshot size in bytes if none is asked for; less if the volume group has less. As in the original.
DEFAULT_SIZE = 10 << 30

#: The setting of LVM for a level, in percent, above which LVM extends a pool and makes no new volume in it.
_THRESHOLD = "activation/thin_pool_autoextend_threshold"
_SIZE = re.compile(r"([0-9]{1,15})([KMGTkmgt%]?)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
#: Volumes that cannot have a snapshot, by the first character of `lv_attr`.
_UNFIT = {
    "s": ("is itself a snapshot", "name its origin"),
    "S": ("is itself a snapshot", "name its origin"),
    "O": ("is being merged with a snapshot", "wait until that is done"),
    "t": ("is a thin pool", "name a volume in it"),
    "d": ("is a VDO pool", "name the volume in it"),
}
_POOL_TROUBLE = {
    "F": "has failed",
    "D": "is out of data space",
    "M": "has read-only metadata",
}


def find(path: str) -> Volume:
    """Return the logical volume at `path`; raises `SourceError` if it is not one, or LVM is missing there."""
    name = _mapper_path(os.path.normpath(path))
    try:
        found = lvs.volumes(name)
    except (LateError, MissingError) as error:
        raise SourceError(error.message, error.hint) from error
    except ProcessError as error:
        if os.geteuid() != 0:
            raise SourceError(
                "only root can see whether {} is a logical volume".format(printable(path)),
                "log in as root, or let the agent run as root: see SECURITY.md",
            ) from error
        raise SourceError(
            "{} is not a logical volume: {}".format(printable(path), error.message), "name it /dev/GROUP/VOLUME"
        ) from error
    if len(found) != 1 or name not in (found[0].path, found[0].dm_path, found[0].full_name):
        raise SourceError("{} is not one logical volume".format(printable(path)), "name it /dev/GROUP/VOLUME")
    if found[0].is_ours:
        raise SourceError("{} is itself a snapshot that blockdiff made".format(printable(path)), "name its origin")
    return found[0]


def _mapper_path(path: str) -> str:
    """Return a path that LVM understands for an active device, whatever path leads to it."""
    try:
        status = os.stat(path)
        if not stat.S_ISBLK(status.st_mode):
            return path
        number = "{}:{}".format(os.major(status.st_rdev), os.minor(status.st_rdev))
        with open("/sys/dev/block/{}/dm/name".format(number)) as file:
            return "/dev/mapper/" + file.read().strip()
    except OSError:  # an inactive volume has no device, but LVM knows its name
        return path


def check(volume: Volume, size: str, keep: bool = False) -> List[str]:
    """Check what can be checked before writers are stopped, and return notes for the user.

    `size` is the size of a thick snapshot: ``20%`` of the origin, a number of bytes with K, M, G or T, or ``""`` for
    `DEFAULT_SIZE` (less if the volume group has less). With `keep`, the snapshot is to be kept. Raises `SourceError` if
    such a snapshot cannot be made.
    """
    _check_fit(volume)
    if volume.is_thin:
        _check_pool(volume)
        return []
    if keep:
        raise SourceError(
            "the snapshot of {} cannot be kept: it is not a thin volume".format(volume.full_name),
            "run without --keep-snapshot",
        )
    needed = size_in_bytes(size, volume)
    if needed > volume.group_free:
        raise SourceError(
            "no room in the volume group {}: a snapshot of {} needs {}, {} are free".format(
                volume.group, volume.full_name, shown_size(needed), shown_size(volume.group_free)
            ),
            "make room there, or ask for less with --snapshot-size",
        )
    if size:
        return []
    what = ", all that the volume group {} has".format(volume.group) if needed == volume.group_free else ""
    return ["the snapshot of {} gets {}{}".format(volume.full_name, shown_size(needed), what)]


def _check_fit(volume: Volume) -> None:
    name = volume.full_name
    if volume.attributes[:1] in _UNFIT and not volume.is_thin:
        what, hint = _UNFIT[volume.attributes[:1]]
        raise SourceError("{} {}".format(name, what), hint)
    if not volume.path or volume.segtype.endswith("-pool"):
        raise SourceError("{} is a part of another volume".format(name), "name that one")
    if volume.health == "p":
        raise SourceError("a disk of {} is missing".format(name), "see `lvs -a -o +devices {}`".format(volume.group))
    if volume.state == "s":
        raise SourceError("{} is suspended".format(name), resume_hint(volume))
    if volume.state != "a":
        raise SourceError("{} is not active".format(name), "activate it: lvchange -a y {}".format(name))


def resume_hint(volume: Volume) -> str:
    """Return what to do about a suspended volume: every process that writes to it waits without limit."""
    return (
        "nothing can write to {}: an LVM command was killed half-way, or is still running; if none is, "
        "`dmsetup resume {}` on the host lets writers continue".format(
            volume.full_name, os.path.basename(volume.dm_path)
        )
    )


def _check_pool(volume: Volume) -> None:
    for pool in _looked_up(volume.group, 'lv_name="{}"'.format(volume.pool)):
        name = "the thin pool {} of {}".format(pool.full_name, volume.full_name)
        if pool.health in _POOL_TROUBLE:
            raise SourceError("{} {}".format(name, _POOL_TROUBLE[pool.health]), "see lvmthin(7)")
        if pool.state in ("c", "C"):
            raise SourceError("{} needs a check".format(name), "lvconvert --repair {}".format(pool.full_name))
        data_limit = float(lvs.setting(_THRESHOLD) or 100)
        metadata_limit = min(data_limit, _metadata_limit(pool))
        for what, level, limit in (
            ("data", pool.data_percent, data_limit),
            ("metadata", pool.metadata_percent, metadata_limit),
        ):
            hint = "extend it first (lvextend{}), or free some of it".format(" --poolmetadatasize" * (what != "data"))
            if level is not None and level >= POOL_LIMIT_PERCENT:
                raise SourceError(
                    "the {} of {} is {:g}% full: a snapshot could stop all its volumes".format(what, name, level),
                    hint,
                )
            if level is not None and level > limit:
                raise SourceError(
                    "the {} of {} is {:g}% full: LVM makes no snapshot in it above {:g}%".format(
                        what, name, level, limit
                    ),
                    hint,
                )


def _metadata_limit(pool: Volume) -> float:
    """Return how full the metadata of a pool may be, in percent: LVM needs 4 MiB free, or 25% if that is less."""
    for metadata in _looked_up(pool.group, 'lv_name="{}"'.format(pool.metadata)):
        return 100.0 - min(25.0, 100.0 * (4 << 20) / metadata.size)
    return 100.0


def _looked_up(group: str, selection: str) -> List[Volume]:
    """Return the volumes that `lvs` selects in a group; raises `SourceError` if `lvs` fails."""
    try:
        return lvs.volumes(group, selection)
    except ProcessError as error:
        raise SourceError(error.message, error.hint) from error


def size_in_bytes(text: str, origin: Volume) -> int:
    """Return how many bytes a snapshot of the size `text` (see `check`) has, in whole extents.

    Raises `SourceError` if `text` is not a size.
    """
    if not text:
        return _in_extents(min(DEFAULT_SIZE, origin.group_free, full_size(origin)), origin)
    match = _SIZE.fullmatch(text)
    if not match or int(match.group(1)) == 0:
        raise SourceError("{} is not a snapshot size".format(printable(text, 100)), "use 20%, or a number with M or G")
    number, unit = match.groups()
    wanted = origin.size * int(number) // 100 if unit == "%" else int(number) * _UNITS[unit.upper()]
    return _in_extents(wanted if wanted < origin.size else full_size(origin), origin)


def _in_extents(size: int, origin: Volume) -> int:
    return max(1, -(-size // origin.extent_size)) * origin.extent_size


def full_size(origin: Volume) -> int:
    """Return how many bytes a snapshot of `origin` needs so that it cannot overflow: LVM's own data need 0.5%."""
    return origin.size + origin.size // 100 + (1 << 20)
