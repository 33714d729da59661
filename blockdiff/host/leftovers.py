"""What runs have left on this machine: all snapshots that are ours, why each is there, and their removal by name.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import re
from typing import Dict, List, Sequence, Tuple

from blockdiff import lvm
from blockdiff.host import lvs
from blockdiff.host.lvs import Volume
from blockdiff.shared.errors import ProcessError, SourceError, printable
from blockdiff.shared.wire import DEAD, KEPT, RUNNING

#: Begins the tag that says for whom a snapshot was made: the server, a colon, and the path of the chain.
CHAIN_TAG = lvs.TAG + "_chain_"

_TAG_LIMIT = 120
_UNFIT = re.compile(r"[^A-Za-z0-9_+.\-/=!:#&]")


def chain_tag(chain: str) -> str:
    """Return the tag for the snapshots of a chain, in what LVM takes in a tag: for people, others may have the same."""
    return CHAIN_TAG + _UNFIT.sub("_", chain)[-(_TAG_LIMIT - len(CHAIN_TAG)) :]


def found(group: str = "") -> List[Dict[str, object]]:
    """Return what is ours in a volume group (``""``: all), as fields for the server. Raises `ProcessError`."""
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
    """Return why a snapshot of ours is there: `RUNNING`, `KEPT` or `DEAD`; ``""`` for what is not ours."""
    if not snapshot.is_ours:
        return ""
    if lvm.KEPT_TAG in snapshot.tags:
        return KEPT
    if lvm.is_abandoned(snapshot):
        return DEAD
    return RUNNING if any(tag.startswith(lvm.PROCESS_TAG) for tag in snapshot.tags) else ""


def remove(names: Sequence[str]) -> Tuple[List[str], List[str]]:
    """Remove snapshots of ours by their full names; return which were removed, and why others were not.

    Raises `SourceError` if one is not ours, or a run is at work on it: nothing is removed then. Raises
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
