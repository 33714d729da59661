"""A thin volume in the lab machine (`tests/lab`): what --keep-snapshot costs beside a run that reads everything."""

import json
import subprocess
import sys
import time
from pathlib import Path

from bench.report import Target
from bench.tools import program
from tests.lab import image
from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup

_GIB, _MIB = 1 << 30, 1 << 20
_SIZE = 8 * _GIB  # some minutes for an emulated processor, and enough that its snapshots do not count for much
#: Stretches that change between two runs, and their size in bytes: 1 % of the volume in all.
_CHANGES, _CHANGE = 80, _MIB

_FILL = "tr '\\0' x < /dev/zero | dd of={path} bs=1M iflag=fullblock count={count} oflag=direct status=none"
_CHANGE_ALL = (
    "for n in $(seq 0 {last}); do dd if=/dev/urandom of={path} bs=1M seek=$((n * 101)) count=1 oflag=direct "
    "conv=notrunc status=none; done"
)


def measured(directory: Path) -> list[Target]:
    """Return what was measured, beside its target; nothing where the lab machine cannot be had."""
    lack = image.missing()
    if lack is not None:
        print(f"left out, the thin volume: {lack}", file=sys.stderr)
        return []
    with Guest(image.image(), [2 * _SIZE]) as guest, VolumeGroup(guest, guest.devices[0]) as group:
        group.pool("pool", f"{_SIZE * 3 // 2 // _MIB}M")
        path = group.thin("data", f"{_SIZE // _MIB}M", "pool")
        guest.run(_FILL.format(path=path, count=_SIZE // _MIB), timeout_s=1200)
        words = [program(), "backup", str(directory / "thin"), guest.url(path), "--lvm", "--json", *guest.arguments]
        _run([*words, "--keep-snapshot"])
        change = _CHANGE_ALL.format(path=path, last=_CHANGES - 1)
        guest.run(change, timeout_s=600)
        hinted_s, read = _run([*words, "--keep-snapshot"])
        guest.run(change, timeout_s=600)
        scan_s, everything = _run(words)
    assert everything == _SIZE, "that was no scan"
    return [
        Target("thin volume, 1% changed, bytes read beside bytes changed", read / (_CHANGES * _CHANGE), 1.5),
        Target(f"its time beside that of the scan ({hinted_s:.1f} s, {scan_s:.1f} s)", hinted_s / scan_s, 0.1),
    ]


def _run(words: list[str]) -> tuple[float, int]:
    """Run a backup; return how long it took, and the bytes of the volume that it read."""
    begun = time.monotonic()
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=1800, check=True)
    return time.monotonic() - begun, int(json.loads(done.stdout)["bytes_read"])
