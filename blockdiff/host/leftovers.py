"""Snapshots that runs have left on this machine: which are ours, why each exists, and how to remove them by name.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import re
from typing import Dict, List, Sequence, Tuple

from blockdiff import lvm
from blockdiff.host import lvs
from blockdiff.host.lvs import Volume
from blockdiff.shared.errors import ProcessError, SourceError, printable
from blockdiff.shared.wire import DEAD, KEPT, RUNNING

#: The prefix of the tag that says for what a snapshot was made. It is followed by the server, a colon, and the path of
#: the chain.
CHAIN_TAG = lvs.TAG + "_chain_"

_TAG_LIMIT = 120
_UNFIT = re.compile(r"[^A-Za-z0-9_+.\-/=!:#&]")


def chain_tag(chain: str) -> str:
    """Return the tag for the snapshots of a chain, in characters that LVM allows in a tag.

    It is only information for people: the snapshots of another chain may have the same tag.
    """
    return CHAIN_TAG + _UNFIT.sub("_", chain)[-(_TAG_LIMIT - len(CHAIN_TAG)) :]


def found(group: str = "") -> List[Dict[str, object]]:
    """Return our snapshots in a volume group (``""``: in all), as fields for the server. Raises `ProcessError`."""
    there = lvs.volumes(group)
    return [_fields(volume, there) for volume in there if state(volume)]


def _fields(snapshot: Volume, there: Sequence[Volume]) -> Dict[str, object]:
    origins = [volume.full_name for volume in there if snapshot.is_ours_of(volume)]
    chains = [tag[len(CHAIN_TAG) :] for tag in snapshot.tags if tag.startswith(CHAIN_TAG)]
    return {
        "name": snapshot.full_name,
        "origin": origins[0] if origins else "",
        "state": state(snapshot),
        "open": snapshot.is_open,
        "size": snapshot.size,
        "made": snapshot.made,
        "chain": chains[0] if chains else "",
    }


def state(snapshot: Volume) -> str:
    """Return why a snapshot of ours exists: `RUNNING`, `KEPT` or `DEAD`; ``""`` if it is not ours."""
    if not snapshot.is_ours:
        return ""
    if lvm.KEPT_TAG in snapshot.tags:
        return KEPT
    if lvm.is_abandoned(snapshot):
        return DEAD
    return RUNNING if any(tag.startswith(lvm.PROCESS_TAG) for tag in snapshot.tags) else ""


def remove(names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Remove snapshots of ours by their full names; return which were removed, and why others were not.

    Raises `SourceError` if one of them is not ours, or if a run is using it: then nothing is removed. Raises
    `ProcessError` if LVM does not answer.
    """
    if not names:
        return [], []
    ours = {volume.full_name: volume for volume in lvs.volumes("") if state(volume)}
    for name in names:
        if name not in ours:
            raise SourceError(
                "{} is not a snapshot that blockdiff made".format(printable(name)),
                "name it GROUP/bd_..., as `blockdiff snapshots` lists it; nothing was removed",
            )
        if state(ours[name]) == RUNNING:
            raise SourceError(
                "a run is using the snapshot {}".format(name), "wait until it has finished; nothing was removed"
            )
    removed, failures = [], []
    for name in names:
        try:
            lvm.remove(ours[name])
            removed.append(name)
        except ProcessError as error:
            failures.append("{}; {}".format(error.message, error.hint))
    return removed, failures
