"""``blockdiff list``: the generations of a chain."""

import json
import os
import sys
import time
from dataclasses import asdict

import click

from blockdiff.chain import listing, overview
from blockdiff.chain.clock import shown_age
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.periods import Place
from blockdiff.cli import completion
from blockdiff.cli.arguments import split_name
from blockdiff.cli.newest import meant_by
from blockdiff.cli.output import check_printed, print_rows, say, shown_time
from blockdiff.database import coordinates
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import EXIT_DAMAGED, ChainError, printable


@click.command("list")
@click.argument("name", shell_complete=completion.chains)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--replica-statement", is_flag=True, help="Print the statement that makes NAME@N, restored, a replica.")
def command(name: str, as_json: bool, replica_statement: bool) -> None:
    """Show the generations of a chain, or the chains in a directory.

    NAME is a chain, NAME@N one generation. For chains of `backup --chain`, NAME stands for the newest NAME-DATE.
    If NAME is a directory, each chain in it has a line.
    """
    chain_name, number = split_name(name)
    if number is None and not replica_statement:
        if _is_directory(name):
            _list_directory(name, as_json)
            return
        meant = meant_by(name)
        chain_name = meant.chain
        if meant.note is not None:
            say(f"note: {meant.note}")
    with Chain(chain_name) as chain:
        if replica_statement:
            click.echo(_replica_statement(chain.generation(number)), nl=False)
            check_printed()
            return
        found = listing.entries(chain)
        if not found or number is not None:
            chain.generation(number)  # raises the error that names what is missing
            found = [entry for entry in found if entry.generation == number]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        _print_table(found)
    if any(entry.state in (listing.DAMAGED, listing.MISSING) for entry in found):
        sys.exit(EXIT_DAMAGED)
    check_printed()


def _is_directory(name: str) -> bool:
    """Return whether NAME is a directory, and not a chain whose NAME a directory has as well."""
    if not os.path.isdir(name):
        return False
    parent, base = os.path.split(name)
    return base in ("", ".", "..") or not Place(parent).inventory.has(base)


def _list_directory(path: str, as_json: bool) -> None:
    found = overview.chains_in(path, time.time())
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=1))
    elif not found:
        say(f"note: there is no chain in {printable(path)}")
    else:
        _print_chains(found)
    if any(entry.state in (listing.DAMAGED, listing.MISSING) for entry in found):
        sys.exit(EXIT_DAMAGED)
    check_printed()


def _print_chains(found: list[overview.ChainEntry]) -> None:
    rows = [("chain", "source", "gen", "last", "age", "image", "stored", "state")]
    rows += [
        (
            printable(os.path.basename(entry.name)),
            printable(entry.source or "-"),
            "-" if entry.generation is None else str(entry.generation),
            shown_time(entry.when),
            "-" if entry.age_s is None else shown_age(entry.age_s),
            _size(entry.image_size),
            _size(entry.stored),
            entry.state if entry.problem is None else f"{entry.state}: {entry.problem}",
        )
        for entry in found
    ]
    print_rows(rows, right=(2, 4, 5, 6))


def _replica_statement(generation: Generation) -> str:
    """Return the statement for a generation; raises `ChainError` if it knows nothing of a database."""
    if generation.manifest_error is not None:
        raise generation.manifest_error
    if generation.manifest is None or generation.manifest.database is None:
        raise ChainError(
            f"generation {generation.number} was made without a database lock, and has no coordinates",
            "back up with --mysql to seed replicas",
        )
    return coordinates.replica_statement(generation.manifest.database)


def _size(count: int | None) -> str:
    return "-" if count is None else shown_size(count)


def _print_table(found: list[listing.Entry]) -> None:
    kinds = {True: "full", False: "incremental", None: "-"}
    rows = [("gen", "when", "kind", "image", "changed", "stored", "consistency", "state")]
    rows += [
        (
            str(entry.generation),
            shown_time(entry.when),
            kinds[entry.full],
            _size(entry.image_size),
            _size(entry.changed),
            _size(entry.stored),
            printable(entry.consistency or "-", 40),
            entry.state if entry.problem is None else f"{entry.state}: {entry.problem}",
        )
        for entry in found
    ]
    print_rows(rows, right=(0, 3, 4, 5))
