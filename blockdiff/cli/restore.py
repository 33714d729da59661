"""``blockdiff restore``: an image, or what is left of it."""

import os
import sys

import click

from blockdiff import merge, salvage, target
from blockdiff.chain import Chain
from blockdiff.cli import print_ranges, say, split_name, watched
from blockdiff.errors import EXIT_DAMAGED, EXIT_WARNING, TargetError, printable


@click.command("restore")
@click.argument("name")
@click.argument("path")
@click.option("--force", is_flag=True, help="Replace an existing file; overwrite a device that holds data.")
@click.option(
    "--salvage", "salvages", is_flag=True, help="Restore what is sound of a damaged generation, list the rest."
)
def command(name: str, path: str, force: bool, salvages: bool) -> None:
    """Write the image of NAME@N (without @N: the newest) to PATH, a new file or a block device.

    Every block is compared with the digests of its generation before it is written. With --salvage, blocks that are
    lost become zeros, and are printed as lines of offset and length in bytes; the exit status is then never 0.
    """
    chain_name, number = split_name(name)
    with Chain(chain_name) as chain, watched("restore") as progress:
        generation = chain.generation(number)
        if _same_directory(os.path.dirname(path), chain.directory.path):
            raise TargetError(
                f"{printable(path)} is in the directory of the chain itself",
                "restore to another place: backups stay apart",
            )
        needed = chain.needed(generation.number)
        image_size = generation.manifest.image_size if generation.manifest else None
        progress.begin(image_size)
        with target.open_target(path, force, image_size) as out:
            if salvages:
                found = salvage.salvage(chain, generation.number, out, progress.advance)
            else:
                merge.merge(needed, out, progress.advance)
        if salvages:
            _report(found)
        if generation.manifest_error is not None:
            say(f"warning: {generation.manifest_error.message}; every block was restored and compared all the same")
            sys.exit(EXIT_WARNING)


def _report(found: salvage.Salvaged) -> None:
    for note in found.notes:
        say(f"note: {note}")
    if not found.lost:
        say("warning: --salvage, and nothing is lost: every block was found and compared")
        sys.exit(EXIT_WARNING)
    count = print_ranges(found.lost)
    say(f"{count} of {found.image_size} bytes are lost, and zero in what was restored")
    sys.exit(EXIT_DAMAGED)


def _same_directory(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path or ".", other)
    except OSError:
        return False
