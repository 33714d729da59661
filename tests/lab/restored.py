"""Generations of chains on the test's machine, restored onto volumes of the guest."""

import gzip
from pathlib import Path

from tests import commands
from tests.lab.volumes import VolumeGroup


def onto_volume(group: VolumeGroup, name: str, size: str, generation: str, scratch: Path) -> str:
    """Restore `generation` (NAME@N) onto a new volume; return its path. `scratch` has room for the image meanwhile."""
    image = scratch / "image"
    commands.done("blockdiff", "restore", generation, image)
    packed = gzip.compress(image.read_bytes(), 1)
    image.unlink()
    path = group.volume(name, size)
    group.guest.put("/run/image.gz", packed)
    group.guest.run(
        f"blkdiscard -f -z {path} && gzip -dc /run/image.gz | dd of={path} bs=1M iflag=fullblock conv=sparse,fsync;"
        " rm /run/image.gz",
        timeout_s=120,
    )
    return path
