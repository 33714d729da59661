"""What no peer is compared in: a vast sparse file, and a long way."""

import os
import shutil
from pathlib import Path

from bench import measure, tools
from bench.distance import Distance
from bench.measure import CommandError
from bench.report import Target
from bench.reserve import Reserve
from bench.tools import FULL, RESTORE
from bench.workload import Workload
from tests.sshd import Sshd

_GIB = 1 << 30
_ROUND_TRIP_S = 0.05


def measured(workload: Workload, sshd: Sshd, directory: Path, reserve: Reserve) -> list[Target]:
    """Return what was measured, beside its target."""
    return [*_sparse(directory, reserve), *_far(workload, sshd, directory, reserve)]


def _far(workload: Workload, sshd: Sshd, directory: Path, reserve: Reserve) -> list[Target]:
    """A full run over a round trip of 50 ms, through one stream and through four."""
    walls = []
    with Distance(sshd.port, _ROUND_TRIP_S / 2) as distance:
        sshd.trust(distance.port)
        for count in (1, 4):
            store = directory / f"store-{count}-streams"
            store.mkdir()
            options = f"--transport ssh --streams {count} {' '.join(sshd.arguments)}"
            tool = tools.blockdiff("far", options, sshd.url("{image}", distance.port))
            command = tool.command(FULL, image=workload.path, store=store)
            walls.append(measure.run(command, {}, directory, reserve).wall_s)
            shutil.rmtree(store)
    return [
        Target(
            f"50 ms round trip, full, 4 streams beside 1 ({walls[1]:.1f} s, {walls[0]:.1f} s)",
            walls[1] / walls[0],
            1 / 3,
        )
    ]


def _sparse(directory: Path, reserve: Reserve) -> list[Target]:
    """A file of 1 TiB with 1 GiB of data, beside a file of that 1 GiB."""
    walls, stored = [], []
    for size in (1024 * _GIB, _GIB):
        image, store, target = directory / "sparse", directory / "store-sparse", directory / "restored"
        Workload(image, _GIB).make()
        os.truncate(image, size)
        store.mkdir()
        tool = tools.blockdiff("sparse")
        places = {"image": image, "store": store, "target": target, "number": 1}
        walls.append(measure.run(tool.command(FULL, **places), {}, directory, reserve).wall_s)
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
