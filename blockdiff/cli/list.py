"""``blockdiff list``: the generations of a chain."""

import json
import sys
from dataclasses import asdict

import click

from blockdiff import coordinates, listing
from blockdiff.blocks import shown_size
from blockdiff.chain import Chain, Generation
from blockdiff.cli import check_printed, shown_time, split_name
from blockdiff.errors import EXIT_DAMAGED, ChainError, printable


@click.command("list")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--replica-statement", is_flag=True, help="Print the statement that makes NAME@N, restored, a replica.")
def command(name: str, as_json: bool, replica_statement: bool) -> None:
    """Show the generations of a chain.

    NAME is that of the chain; NAME@N is one generation.
    """
    chain_name, number = split_name(name)
    with Chain(chain_name) as chain:
        if replica_statement:
            click.echo(_replica_statement(chain.generation(number)), nl=False)
            check_printed()
            return
        found = listing.entries(chain)
        if not found or number is not None:
            chain.generation(number)  # says what is not there
            found = [entry for entry in found if entry.generation == number]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        _print_table(found)
    if any(entry.state in (listing.DAMAGED, listing.MISSING) for entry in found):
        sys.exit(EXIT_DAMAGED)
    check_printed()


def _replica_statement(generation: Generation) -> str:
    """Return the statement for a generation; raises `ChainError` where it knows nothing of a database."""
    if generation.manifest_error is not None:
        raise generation.manifest_error
    if generation.manifest is None or generation.manifest.database is None:
        raise ChainError(
            f"generation {generation.number} was made without a database lock, and has no coordinates",
            "use --mysql for backups that replicas are to be seeded from",
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
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in (0, 3, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        click.echo("  ".join([*cells, row[7]]).rstrip())
