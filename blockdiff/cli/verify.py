"""``blockdiff verify``: prove that generations restore exactly, or compare one with its source."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict

import click

from blockdiff import transport
from blockdiff.chain import listing
from blockdiff.chain.generations import Chain, missing
from blockdiff.check import proofs, verify
from blockdiff.check.compare import compare
from blockdiff.check.verify import Verdict
from blockdiff.cli import completion
from blockdiff.cli.arguments import agent_prefix, split_name
from blockdiff.cli.newest import Meant, meant_by
from blockdiff.cli.output import print_ranges, salvage_command, say, say_error, watched
from blockdiff.progress import Progress
from blockdiff.session.session import Session
from blockdiff.shared.errors import (
    EXIT_DAMAGED,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_WARNING,
    BlockdiffError,
    DamagedError,
    StorageError,
    UsageError,
    printable,
)
from blockdiff.transport import address


class Subset(click.ParamType[tuple[int, int]]):
    """K/N: the K-th of N parts."""

    name = "K/N"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """Return K and N."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", str(value))
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            self.fail(f"{printable(str(value), 100)!r} is not a part like 3/7", param, ctx)
        return int(match[1]), int(match[2])


@click.command("verify")
@click.argument("name", shell_complete=completion.chains)
@click.option("--deep", is_flag=True, help="Also merge every image, as a restore does, and keep nothing.")
@click.option("--subset", type=Subset(), metavar="K/N", help="Prove the K-th of N parts: N runs prove everything.")
@click.option("--source", metavar="SOURCE", help="Compare the newest generation, or NAME@N, with a source instead.")
@click.option("--transport", type=click.Choice(list(transport.NAMES)), help="To the SOURCE, as for backup.")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE", help="As for ssh -o.")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON instead.")
def command(
    name: str,
    deep: bool,
    subset: tuple[int, int] | None,
    source: str | None,
    transport: str | None,
    ssh_options: tuple[str, ...],
    as_json: bool,
) -> None:
    """Prove that generations restore exactly: all of NAME, or NAME@N.

    For chains of `backup --chain`, NAME stands for the newest NAME-DATE.

    Reads everything once, writes nothing. Prints nothing when all is well, unless standard
    output is a terminal.

    \b
    Examples:
      blockdiff verify /var/backup/web1
      blockdiff verify /var/backup/web1 --subset 3/7
      blockdiff verify /var/backup/web1 --source root@web1:/srv/web1.img
    """
    chain_name, number = split_name(name)
    if number is not None and subset is not None:
        raise UsageError("--subset chooses among all generations: omit @N")
    if source is not None:
        if deep or subset is not None:
            raise UsageError("--source cannot be combined with --deep or --subset: run one after the other")
        _compare(_chosen(chain_name, number).chain, number, source, transport, ssh_options, as_json)
        return
    meant = _chosen(chain_name, number)
    where = "" if meant.chain == chain_name else f"{printable(meant.chain)}: "
    found = []
    with Chain(meant.chain) as chain, watched("verify") as progress:
        if number is not None or not chain.generations:
            chain.generation(number)  # raises the error that names what is missing
        progress.begin(_total(chain, number, deep, subset))
        for verdict in _verdicts(chain, number, deep, subset, progress):
            found.append(_entry(chain, verdict))
            if not as_json:
                with progress.aside():
                    _say(verdict, where)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    states = {entry["state"] for entry in found}
    if listing.DAMAGED in states and not as_json:
        click.echo(f"  what is sound of one of these: {salvage_command(meant.chain, None)}", err=True)
    if states - {listing.OK}:
        sys.exit(EXIT_DAMAGED)
    if meant.passes_over:
        sys.exit(EXIT_WARNING)


def _chosen(name: str, number: int | None) -> Meant:
    """Return the chain to verify; say which one it is if a user watches, and always if a newer one is left."""
    meant = meant_by(name) if number is None else Meant(name)
    if meant.note is not None and (meant.passes_over or sys.stderr.isatty()):
        say(f"{'warning' if meant.passes_over else 'note'}: {meant.note}")
    return meant


def _total(chain: Chain, number: int | None, deep: bool, subset: tuple[int, int] | None) -> int | None:
    """Return how many bytes will be looked at, of deltas and of images; None if no manifest says."""
    part, parts = subset or (0, 1)
    last = chain.last() if number is None else number
    proven = [n for n in chain.generations if number in (None, n) and n <= last and (n - part) % parts == 0]
    read = proven if number is None else [generation.number for generation in chain.needed(number)]
    deltas = [chain.generations[n].manifest for n in read]
    images = [chain.generations[n].manifest for n in proven if deep]
    total = 0
    for known in deltas:
        if known is None:
            return None
        total += known.changed_bytes
    for known in images:
        if known is None or known.image_size is None:
            return None
        total += known.image_size
    return total


def _entry(chain: Chain, verdict: Verdict) -> dict[str, object]:
    """Return what `--json` prints of a generation, in the words of `list --json`."""
    bad = listing.DAMAGED if verdict.number in chain.generations else listing.MISSING
    error = verdict.error
    return {
        "generation": verdict.number,
        "state": listing.OK if error is None else bad,
        "problem": None if error is None else error.message,
        "hint": None if error is None else error.hint,
    }


def _say(verdict: Verdict, where: str) -> None:
    if verdict.error is not None:
        say_error(verdict.error, f"{where}generation {verdict.number}: ")
    elif sys.stdout.isatty():
        click.echo(f"generation {verdict.number}: ok")


def _verdicts(
    chain: Chain, number: int | None, deep: bool, subset: tuple[int, int] | None, progress: Progress
) -> Iterator[Verdict]:
    for verdict in _quick(chain, number, progress) if subset is None else _part(chain, *subset, progress):
        if deep and verdict.error is None:
            yield Verdict(verdict.number, _error(proofs.put_together, chain, verdict.number, progress))
        else:
            yield verdict


def _quick(chain: Chain, number: int | None, progress: Progress) -> Iterator[Verdict]:
    with verify.Verifier(chain, progress.advance) as verifier:
        yield from verifier.all() if number is None else [verifier.one(number)]


def _part(chain: Chain, part: int, parts: int, progress: Progress) -> Iterator[Verdict]:
    """Yield the verdicts on every `parts`-th generation, and on all that are missing."""
    for first, last in chain.spans(chain.last()):
        if first not in chain.generations:
            yield Verdict(first, missing(first, last))
        elif first % parts == part % parts:
            yield Verdict(first, _error(proofs.alone, chain, first, progress))


def _error(proof: proofs.Proof, chain: Chain, number: int, progress: Progress) -> BlockdiffError | None:
    try:
        proof(chain, number, progress.advance)
    except (DamagedError, StorageError) as error:
        return error
    return None


def _compare(
    name: str, number: int | None, source: str, transport: str | None, ssh_options: tuple[str, ...], as_json: bool
) -> None:
    """Say where the generation and the source differ, as lines of offset and length in bytes."""
    where = address.parse(source)
    with ExitStack() as stack:
        chain = stack.enter_context(Chain(name))
        generation = chain.generation(number)
        progress = stack.enter_context(watched("verify"))
        session = stack.enter_context(Session(where, transport, ssh_options, prefix=agent_prefix() or ()))
        found = compare(generation, session, where, progress)
    if as_json:
        click.echo(json.dumps({"generation": generation.number, "source": source, **asdict(found)}, indent=1))
        sys.exit(EXIT_DONE if found.is_none else EXIT_FAILED)
    if found.is_none:
        if sys.stdout.isatty():
            click.echo(f"{printable(source)} is the image of generation {generation.number}")
        return
    differ = print_ranges(found.ranges)
    sizes = (
        ""
        if found.image_size in (None, found.source_size)
        else f", and has {found.source_size} bytes, not {found.image_size}"
    )
    say(f"{printable(source)} differs from generation {generation.number} in blocks of {differ} bytes{sizes}")
    if found.unrest:
        say(f"note: {printable(source)} {found.unrest}: what differs may come from that")
    sys.exit(EXIT_FAILED)
