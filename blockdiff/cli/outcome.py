"""How a command ends: the boundary where errors become sentences and exit statuses."""

import os
import sys
import traceback

import click

from blockdiff.cli import standard
from blockdiff.cli.output import check_printed, say, say_error
from blockdiff.shared import pipeline, signals
from blockdiff.shared.errors import EXIT_DONE, BlockdiffError, Interrupted, StorageError, of_system, printable


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
