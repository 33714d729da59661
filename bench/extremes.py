"""What no peer is compared in: a vast sparse file."""

import os
from pathlib import Path

from bench import measure, tools
from bench.measure import CommandError
from bench.report import Target
from bench.tools import FULL, RESTORE
from bench.workload import Workload
from tests.sshd import Sshd

_GIB = 1 << 30


def measured(workload: Workload, sshd: Sshd, directory: Path) -> list[Target]:
    """Return what was measured, beside its target."""
    return [*_sparse(directory)]


def _sparse(directory: Path) -> list[Target]:
    """A file of 1 TiB with 1 GiB of data, beside a file of that 1 GiB."""
    walls, stored = [], []
    for size in (1024 * _GIB, _GIB):
        image, store, target = directory / "sparse", directory / "store-sparse", directory / "restored"
        Workload(image, _GIB).make()
        os.truncate(image, size)
        store.mkdir()
        tool = tools.blockdiff("sparse")
        places = {"image": image, "store": store, "target": target, "number": 1}
        walls.append(measure.run(tool.command(FULL, **places), {}, directory).wall_s)
        stored.append((store / "chain.1.gz").stat().st_size)
        measure.run(tool.command(RESTORE, **places), {}, directory)
        if target.stat().st_blocks * 512 > 2 * _GIB:
            raise CommandError("the restored image is not sparse")
        for path in (image, target, *store.iterdir()):
            path.unlink()
        store.rmdir()
    return [
        Target("sparse 1 TiB with 1 GiB, full, seconds beyond 1 GiB", walls[0] - walls[1], 10),
        Target("its delta beside that of 1 GiB", stored[0] / stored[1], 1.01),
    ]
