"""How a command ends: the boundary where errors become sentences and exit statuses."""

import os
import sys
import traceback
from typing import TYPE_CHECKING

import click

from blockdiff import __version__
from blockdiff.cli import standard
from blockdiff.cli.memory import keep_memory
from blockdiff.cli.output import check_printed, say, say_error
from blockdiff.shared import pipeline, signals, trace
from blockdiff.shared.errors import EXIT_DONE, BlockdiffError, Interrupted, StorageError, of_system, printable

if TYPE_CHECKING:
    from blockdiff.shared.tracewriter import TraceFile

#: Names the file that a trace is written to; `_ON_STDERR` only lets the traceback of a fault be printed.
TRACE = "BLOCKDIFF_TRACE"
_ON_STDERR = "1"


def run(command: click.Command, name: str) -> None:
    """Run a command and end the process with its exit status: the boundary for errors of every kind.

    The status is settled before anything is printed, and does not depend on whether somebody reads it.
    """
    standard.attach()
    traced = _traced(name)
    status = _outcome(command, name)
    try:
        check_printed()
    except StorageError as error:
        say_error(error)  # it does not change what was done
    if traced is not None:
        traced.add(f"exit status {status}")
        if traced.failure is not None:
            file = printable(os.environ[TRACE], 200)
            say(f"warning: cannot write the trace to {file}: {traced.failure}; nothing else is missing")
    sys.exit(status)


def _traced(name: str) -> "TraceFile | None":
    """Begin the trace of this process if one is asked for."""
    path = os.environ.get(TRACE, "")
    if path in ("", _ON_STDERR):
        return None
    from blockdiff.shared.tracewriter import TraceFile  # here, because mostly nobody asks for it

    traced = TraceFile(path)
    trace.report, trace.link = traced.add, traced.link
    traced.add(f"{name}: blockdiff {__version__}, python {sys.version.split()[0]}, {os.uname().release}")
    return traced


def _outcome(command: click.Command, name: str) -> int:
    """Run a command, say what went wrong, and return the exit status."""
    try:
        signals.unwind()
        keep_memory()
        pipeline.switch_quickly()
        try:
            # not through `main`, which treats any broken pipe as one of standard output, and exits without a word
            with command.make_context(name, sys.argv[1:]) as context:
                command.invoke(context)
        finally:
            signals.ignore()  # only the report is left to do
    except SystemExit as ending:
        return int(ending.code or EXIT_DONE)
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except BlockdiffError as error:
        _trace(error)
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
    """Report an unforeseen error, with its traceback if that was asked for, and return the exit status."""
    _trace(error)
    if os.environ.get(TRACE) == _ON_STDERR or sys.flags.dev_mode:
        traceback.print_exception(error)
    known = of_system(error)
    if known is None:
        known = BlockdiffError(
            f"this is a bug in blockdiff: {type(error).__name__}: {printable(str(error), 500)}",
            f"run it again with {TRACE}=FILE in the environment, and report it with that file",
        )
    say_error(known)
    return known.exit_status


def _trace(error: BaseException) -> None:
    """Put where an error arose, and what it comes from, into the trace: kinds and places, no word of a message."""
    while trace.report is not None:
        for line in "".join(traceback.format_tb(error.__traceback__)).splitlines():
            trace.report(line)
        trace.report(f"ended by {type(error).__name__}")
        cause = error.__cause__ or error.__context__
        if cause is None:
            return
        error = cause
        trace.report("which comes from:")
