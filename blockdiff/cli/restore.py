"""``blockdiff restore``: an image, or what is left of it."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import click

from blockdiff import merge
from blockdiff.chain.generations import Chain, Generation
from blockdiff.cli import completion
from blockdiff.cli.arguments import split_name
from blockdiff.cli.newest import meant_by
from blockdiff.cli.output import print_ranges, salvage_command, say, shown_time, watched
from blockdiff.restore import salvage, target
from blockdiff.restore.devicetarget import DeviceTarget
from blockdiff.restore.filetarget import FileTarget
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import EXIT_DAMAGED, EXIT_WARNING, DamagedError, TargetError, UsageError, printable

_ELSEWHERE = re.compile(r"ssh://|([^/]+@)?([^/:@]+|\[[^/\]]+\]):/")


@dataclass
class _Outcome:
    """What came, or would come, of a restore: what `--json` prints. Sizes are in bytes, `lost` is (offset, length)."""

    name: str
    generation: int
    when: str | None
    source: str | None
    consistency: str | None
    image_size: int | None
    target: str
    dry_run: bool
    generations: list[int]
    lost: list[tuple[int, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@click.command("restore")
@click.argument("name", shell_complete=completion.chains)
@click.argument("path", shell_complete=completion.files)
@click.option("--force", is_flag=True, help="Replace an existing file; overwrite a device that holds data.")
@click.option(
    "--salvage", "salvages", is_flag=True, help="Restore what is sound of a damaged generation, list the rest."
)
@click.option("--dry-run", is_flag=True, help="Look at the chain and at PATH, say what would be done, write nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line about what was restored, as on a terminal.")
@click.option("--json", "as_json", is_flag=True, help="Print that as JSON.")
def command(name: str, path: str, force: bool, salvages: bool, dry_run: bool, verbose: bool, as_json: bool) -> None:
    """Write the image of a generation to a file or a device.

    NAME@N is the generation, NAME the newest; PATH is a new file or a block device.

    Every block is compared with the digests of its generation before it is written. With --salvage, blocks that are
    lost become zeros, and are printed as lines of offset and length in bytes; the exit status is then never 0.

    \b
    Examples:
      blockdiff restore /var/backup/web1 /srv/restored.img
      blockdiff restore /var/backup/vm7-202611@3 /dev/vg/vm7 --force
    """
    _refuse_elsewhere(name, path)
    if salvages and dry_run:
        raise UsageError("--salvage finds out what is lost while it reads: omit --dry-run")
    chain_name, number = split_name(name)
    with Chain(chain_name) as chain:
        generation = chain.generation(number)
        if _same_directory(os.path.dirname(path), chain.directory.path):
            raise TargetError(
                f"{printable(path)} is in the directory of the chain itself",
                "restore to another place: a chain directory holds only chains",
            )
        needed = chain.needed(generation.number)
        outcome = _outcome(chain, generation, path, dry_run, needed)
        if number is None and (newer := meant_by(chain_name).note) is not None:
            outcome.warnings.append(newer)
        out = target.open_target(path, force, outcome.image_size)
        if dry_run:
            _look(chain, needed, out, outcome)
        else:
            _restore(chain, needed, out, outcome, salvages)
    outcome.warnings += out.warnings
    outcome.notes += out.notes
    _report(outcome, salvages, verbose or sys.stdout.isatty(), as_json)


def _refuse_elsewhere(name: str, path: str) -> None:
    """Raise `UsageError` for what is not a place on this machine: an image is not written in order."""
    if path == "-":
        raise UsageError(
            "a restore writes to a file or a block device, not to standard output",
            f"restore to a file, and then send that: blockdiff restore {shlex.quote(printable(name))} FILE && cat FILE",
        )
    if _ELSEWHERE.match(path) and not os.path.lexists(path.partition("/")[0] if "://" not in path else path):
        raise UsageError(
            f"{printable(path)} is on another machine, and a restore writes to this one",
            "restore to a file here, and then copy that: rsync -S FILE HOST:FILE, or ssh HOST dd of=DEVICE bs=1M <FILE",
        )


def _same_directory(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path or ".", other)
    except OSError:
        return False


def _outcome(chain: Chain, generation: Generation, path: str, dry_run: bool, needed: list[Generation]) -> _Outcome:
    known = generation.manifest
    return _Outcome(
        name=chain.name,
        generation=generation.number,
        when=known.finished if known else None,
        source=str(known.source) if known else None,
        consistency=known.consistency if known else None,
        image_size=known.image_size if known else None,
        target=path,
        dry_run=dry_run,
        generations=[each.number for each in needed],
    )


def _look(chain: Chain, needed: list[Generation], out: FileTarget | DeviceTarget, outcome: _Outcome) -> None:
    """Check what can be checked without reading every block; raises what a restore would raise."""
    out.check()
    for generation in needed:
        generation.check_files()
        chain.check_parent(generation)
    oldest = needed[-1]
    if chain.needs_older(oldest):
        outcome.warnings.append(
            f"generation {oldest.number - 1} is missing: the restore fails if it needs a block of that one"
        )
    if isinstance(out, FileTarget) and outcome.image_size is not None and out.free_bytes() < outcome.image_size:
        outcome.warnings.append(
            f"the image has {shown_size(outcome.image_size)}, but only {shown_size(out.free_bytes())} are free for "
            f"{printable(out.path)}: it fits only if enough of it is zeros, which take no room"
        )


def _restore(
    chain: Chain, needed: list[Generation], out: FileTarget | DeviceTarget, outcome: _Outcome, salvages: bool
) -> None:
    done = 0
    try:
        with watched("restore") as progress, out:

            def advance(length: int) -> None:
                nonlocal done
                done += length
                progress.advance(length)

            progress.begin(outcome.image_size)
            _write(chain, needed, out, outcome, salvages, advance)
    except BaseException:
        if out.is_changed:
            _warn_of_incomplete(outcome, done)
        raise
    if needed[0].manifest_error is not None:
        error = needed[0].manifest_error.message
        outcome.warnings.append(f"{error}; but every block was restored and compared")


def _warn_of_incomplete(outcome: _Outcome, done: int) -> None:
    size = "" if outcome.image_size is None else f" of {shown_size(outcome.image_size)}"
    say(
        f"warning: {printable(outcome.target)} is incomplete now: {shown_size(done)}{size} of generation "
        f"{outcome.generation} were written over its old content; do not use it before a restore to it is complete"
    )


def _write(
    chain: Chain,
    needed: list[Generation],
    out: FileTarget | DeviceTarget,
    outcome: _Outcome,
    salvages: bool,
    advance: Callable[[int], object],
) -> None:
    if not salvages:
        try:
            outcome.image_size = merge.merge(needed, out, advance)
        except DamagedError as error:
            raise DamagedError(error.message, _after_damage(error.hint, outcome)) from error
        return
    found = salvage.salvage(chain, needed[0].number, out, advance)
    outcome.image_size, outcome.lost = found.image_size, found.lost
    outcome.notes += found.notes
    if not found.lost:
        outcome.warnings.append("--salvage was not needed: every block was found and compared")


def _after_damage(hint: str | None, outcome: _Outcome) -> str:
    """Return `hint` with what is to be done next."""
    said = "" if hint is None else f"{hint}; or "
    return (
        f"{said}restore a sound generation (blockdiff verify {shlex.quote(printable(outcome.name))} says which),"
        f" or what is sound of this one: {salvage_command(outcome.name, outcome.generation)}"
    )


def _report(outcome: _Outcome, salvaged: bool, verbose: bool, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(asdict(outcome), indent=1))
    elif salvaged:
        print_ranges(outcome.lost)
    elif verbose or outcome.dry_run:
        click.echo(_sentence(outcome))
    for note in outcome.notes:
        say(f"note: {note}")
    for warning in outcome.warnings:
        say(f"warning: {warning}")
    if outcome.lost:
        lost, size = sum(length for _offset, length in outcome.lost), outcome.image_size or 0
        say(f"{shown_size(lost)} of {shown_size(size)} are lost, and zero in what was restored")
        sys.exit(EXIT_DAMAGED)
    if outcome.warnings:
        sys.exit(EXIT_WARNING)


def _sentence(outcome: _Outcome) -> str:
    what = f"generation {outcome.generation} of {printable(outcome.name)}"
    if outcome.when is not None:
        what += f", taken {shown_time(outcome.when)}"
    size = "an image of unknown size" if outcome.image_size is None else shown_size(outcome.image_size)
    if outcome.dry_run:
        deltas = "its delta alone" if len(outcome.generations) == 1 else f"up to {len(outcome.generations)} deltas"
        return f"would restore {what}, to {printable(outcome.target)}: {size}, from {deltas}; nothing was written"
    return f"restored {what}, to {printable(outcome.target)}: {size}, every block was checked"
