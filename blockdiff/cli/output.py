"""What the commands print, and how it looks."""

import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import click

from blockdiff.cli import standard
from blockdiff.progress import Progress
from blockdiff.shared.errors import BlockdiffError, StorageError, printable


def say(text: str) -> None:
    """Print one line on standard error."""
    click.echo(f"blockdiff: {text}", err=True)


def say_error(error: BlockdiffError, before: str = "") -> None:
    """Print an error and its hint on standard error."""
    say(before + printable(error.message))
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)


def salvage_command(name: str, number: int | None) -> str:
    """Return what saves the rest of a damaged generation, N for None, and when to do that."""
    which = shlex.quote(f"{printable(name)}@{'N' if number is None else number}")
    return f"blockdiff restore --salvage {which} FILE; do that before blockdiff repair"


def print_ranges(ranges: list[tuple[int, int]]) -> int:
    """Print ranges as lines of offset and length in bytes, and return how many bytes they are together."""
    for offset, length in ranges:
        click.echo(f"{offset} {length}")
    return sum(length for _offset, length in ranges)


def print_rows(rows: Sequence[tuple[str, ...]], right: Collection[int]) -> None:
    """Print a table; the columns in `right` are aligned to the right, and the last one is not padded."""
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def check_printed() -> None:
    """Raise `StorageError` if standard output could not take what the command was asked for."""
    if (reason := standard.lost()) is not None:
        raise StorageError(f"cannot write to standard output: {reason}", "what was printed there is not complete")


def shown_time(text: str | None) -> str:
    """Return a time of a manifest in local time, a dash for None."""
    if text is None:
        return "-"
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return printable(text, 40)


@contextmanager
def watched(what: str) -> Iterator[Progress]:
    """Yield a progress bar if standard error is a terminal, and a silent one elsewhere.

    What is printed until then is printed within `Progress.aside`.
    """
    if not sys.stderr.isatty():
        yield Progress()
        return
    from blockdiff.cli.progressbar import Bar  # here, because its import takes longer than a small backup

    with Bar(printable(what, 40)) as bar:
        yield bar
