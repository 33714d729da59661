"""The entrances of all commands: what is done before anything of ours is imported or opened."""

import os
import signal
from importlib import import_module

#: Descriptors below this number are the caller's: the original's commands speak on 0, 1, 5 and 6.
FIRST_OF_OURS = 10


def keep_apart() -> None:
    """Take up every descriptor below `FIRST_OF_OURS` that the caller left closed, so that nothing of ours gets it.

    Standard streams get what cannot be used in their direction: reading or writing fails as it does on a closed one,
    and children find them as we did. The others are not for children.
    """
    for number in range(FIRST_OF_OURS):
        try:
            os.fstat(number)
        except OSError:
            try:
                fd = os.open(os.devnull, os.O_WRONLY if number == 0 else os.O_RDONLY)
            except OSError:
                return  # a machine without it: whatever needs the descriptor will say so
            os.set_inheritable(fd, number <= 2)


def _run(module: str, function: str) -> None:
    keep_apart()
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        # until the command listens to it, an interrupt ends us at once: within an import it would be a traceback
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
