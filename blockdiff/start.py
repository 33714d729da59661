"""The entry points of all commands, and what must be done before they import our modules or open files."""

import os
import signal
from importlib import import_module

#: Descriptors below this number belong to the caller: the original's commands use 0, 1, 5 and 6.
FIRST_OF_OURS = 10


def keep_apart() -> None:
    """Open every descriptor below `FIRST_OF_OURS` that the caller left closed, so that no file of ours gets its number.

    Standard streams are opened in the wrong direction, so reading or writing fails as on a closed one; children inherit
    them. Children do not inherit the others.
    """
    for number in range(FIRST_OF_OURS):
        try:
            os.fstat(number)
        except OSError:
            try:
                fd = os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
            except OSError:
                return  # a machine without /dev/null: what needs the descriptor reports that
            os.set_inheritable(fd, number <= 2)


def _run(module: str, function: str) -> None:
    keep_apart()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # until the command handles it, SIGINT ends the process at once: no traceback from the middle of an import
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    getattr(import_module(f"blockdiff.cli.{module}"), function)()


def blockdiff() -> None:
    """The entry point."""
    _run("modern", "main")


def blockdiff_backup() -> None:
    """The entry point."""
    _run("original", "blockdiff_backup")


def blockdiff_dump() -> None:
    """The entry point."""
    _run("original", "blockdiff_dump")


def blockdiff_merge() -> None:
    """The entry point."""
    _run("original", "blockdiff_merge")


def cronlog() -> None:
    """The entry point."""
    _run("original", "cronlog")


def mysqllock() -> None:
    """The entry point."""
    _run("locking", "main")


def ssh_blockdiff_dump() -> None:
    """The entry point."""
    _run("original", "ssh_blockdiff_dump")


def ssh_lvm_dump() -> None:
    """The entry point."""
    _run("original", "ssh_lvm_dump")
