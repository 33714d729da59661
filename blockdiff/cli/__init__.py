"""The commands: the only place that prints, exits, and knows everybody.

Here is what they share: the boundary where errors become sentences and exit statuses.
"""

import os
import re
import shlex
import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import click

from blockdiff.cli import standard
from blockdiff.progress import Progress
from blockdiff.shared import pipeline, signals
from blockdiff.shared.errors import (
    EXIT_DONE,
    BlockdiffError,
    Interrupted,
    StorageError,
    UsageError,
    of_system,
    printable,
)

#: How long the user lets something take.
SECONDS = click.FloatRange(min=1, max=86400)

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)(?:i?B)?", re.IGNORECASE)


class ByteSize(click.ParamType[int]):
    """A number of bytes, 1 or more, with K, M, G or T for powers of 1024."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the number of bytes."""
        match = _SIZE.fullmatch(str(value))
        if match is None or int(match[1]) == 0:
            self.fail(f"{printable(str(value), 100)!r} is no size; use a number with K, M or G behind it", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


def agent_prefix() -> list[str] | None:
    """Return the command to run the agent under, from ``SSH_BLOCKDIFF_PREFIX``; None where it is not set.

    Raises `UsageError` for open quotes.
    """
    line = os.environ.get("SSH_BLOCKDIFF_PREFIX")
    if line is None:
        return None
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"SSH_BLOCKDIFF_PREFIX is no command line: {error}") from error


def say(text: str) -> None:
    """Print one line on standard error."""
    click.echo(f"blockdiff: {text}", err=True)


def say_error(error: BlockdiffError, before: str = "") -> None:
    """Print an error and its hint on standard error."""
    say(before + printable(error.message))
    if error.hint:
        click.echo(f"  {printable(error.hint)}", err=True)


def split_name(text: str) -> tuple[str, int | None]:
    """Return NAME and N of ``NAME@N``, None for N where there is no ``@N``."""
    match = re.fullmatch(r"(.+)@([1-9][0-9]{0,17})", text, re.DOTALL)
    return (match[1], int(match[2])) if match else (text, None)


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
    """Print a table; the columns in `right` are aligned to the right, and the last one is as long as it is."""
    widths = [max(map(len, column)) for column in [*zip(*rows)][:-1]]
    for row in rows:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        click.echo("  ".join([*cells, row[-1]]).rstrip())


def check_printed() -> None:
    """Raise `StorageError` where standard output could not take what the command was asked for."""
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
    """Yield a progress bar where standard error is a terminal, and a silent one elsewhere.

    What is printed meanwhile is printed within `Progress.aside`.
    """
    if not sys.stderr.isatty():
        yield Progress()
        return
    from blockdiff.cli.progressbar import Bar  # here, because its import takes longer than a small backup

    with Bar(printable(what, 40)) as bar:
        yield bar


def run(command: click.Command, name: str) -> None:
    """Run a command and end the process with its exit status: the boundary for errors of every kind.

    The status is settled before anything is said of it, and does not depend on whether somebody takes what is said.
    """
    standard.attach()
    status = _outcome(command, name)
    try:
        check_printed()
    except StorageError as error:
        say_error(error)  # it does not change what was done
    sys.exit(status)


def _outcome(command: click.Command, name: str) -> int:
    """Run a command, say what went wrong, and return the exit status."""
    try:
        signals.unwind()
        pipeline.keep_memory()
        pipeline.switch_quickly()
        try:
            # not through `main`, which takes any broken pipe for one of standard output, and exits without a word
            with command.make_context(name, sys.argv[1:]) as context:
                command.invoke(context)
        finally:
            signals.ignore()  # what is left to do is to tell how it went
    except SystemExit as ending:
        return int(ending.code or EXIT_DONE)
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except BlockdiffError as error:
        say_error(error)
        return error.exit_status
    except Interrupted as error:
        say(str(error))
        return error.exit_status
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:  # noqa: BLE001  # the boundary
        return _failed(error)
    return EXIT_DONE


def _failed(error: BaseException) -> int:
    """Say what nobody had foreseen, with its traceback where that was asked for, and return the exit status."""
    if os.environ.get("BLOCKDIFF_TRACE") or sys.flags.dev_mode:
        traceback.print_exception(error)
    known = of_system(error)
    if known is None:
        known = BlockdiffError(
            f"this is a fault in blockdiff: {type(error).__name__}: {printable(str(error), 500)}",
            "report it, with what is printed when it is run again with BLOCKDIFF_TRACE=1 in the environment",
        )
    say_error(known)
    return known.exit_status
