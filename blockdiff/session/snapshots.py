"""Snapshots that runs leave on a host: who owns them, and which of them no run will remove."""

import hashlib
import os
import re
import socket
from collections.abc import Sequence

from blockdiff.session.rules import Left
from blockdiff.shared import wire
from blockdiff.transport.address import Address

_WHY = {
    wire.RUNNING: "a run is using it",
    wire.KEPT: "kept for the next run",
    wire.DEAD: "its run died; the next one removes it",
}


def owner(name: str, period: str) -> tuple[str, str]:
    """Return the owner of the snapshots that runs of NAME keep: as a word for the agent, and in words for people.

    Neither depends on a manifest, which may not exist yet. Both are without the period: the chain of a new month takes
    over the snapshots of the last month's chain, which has no more runs.
    """
    place = os.path.realpath(name).removesuffix(period)
    word = hashlib.sha256(os.fsencode(f"{socket.gethostname()}\0{place}")).hexdigest()[:32]
    return word, f"{socket.gethostname()}:{place}"


def is_useless(left: Left) -> bool:
    """Return whether no run will continue from a snapshot, and no run will remove it."""
    return left.state != wire.RUNNING and (left.volume is None or chain_is_gone(left))


def chain_is_gone(left: Left) -> bool:
    """Return whether a snapshot was made for a chain on this machine that no longer has a generation.

    If the directory is missing (its disk may not be mounted), that is not known, and the chain counts as existing.
    """
    server, _colon, place = (left.chain or "").partition(":")
    directory, base = os.path.split(place)
    if server != socket.gethostname() or not directory.startswith("/"):
        return False
    # characters that LVM does not allow in a tag were replaced by underscores
    manifest = re.compile(re.escape(base).replace("_", ".") + r".*\.json", re.DOTALL)
    try:
        return not any(manifest.fullmatch(name) for name in os.listdir(directory))
    except OSError:
        return False


def notes(found: Sequence[Left], address: Address) -> list[str]:
    """Return notes about the snapshots on a host that no run will remove."""
    useless = {left.name: left for left in found if is_useless(left)}
    host = address.login if address.port is None else f"ssh://{address.login}:{address.port}/"
    command = "blockdiff snapshots" if address.host is None else f"blockdiff snapshots {host}"
    return [
        f"the snapshot {left.name} is still on the host, although {why(left)}: "
        f"`{command} --remove {left.name}` removes it"
        for left in useless.values()
    ]


def why(left: Left) -> str:
    """Return in words why a snapshot exists."""
    if is_useless(left):
        shown = "its volume no longer exists" if left.volume is None else "its chain no longer exists"
    else:
        shown = _WHY[left.state]
    return shown + ("; it is open" if left.open and left.state != wire.RUNNING else "")
