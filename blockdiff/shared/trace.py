"""Where the parts of a run report what they do, for a trace (`blockdiff.shared.tracewriter`); most runs write none.

Shipped to the host: standard library only, Python 3.6 or newer. Nothing secret can get into a trace: it has only the
program's name of a child process, the kind and size of a frame, and our constant name of a phase.
"""

import os
import subprocess
from typing import TYPE_CHECKING, Callable, Optional, Set

if TYPE_CHECKING:
    from blockdiff.shared.wire import Buffer, Carrier, Link

#: Takes one line for the trace; None if no trace is written.
report: "Optional[Callable[[str], None]]" = None
#: Makes the server's end of a connection instead of `wire.Link`; None if no trace is written.
link: "Optional[Callable[[Carrier, float, Optional[float], Callable[[Buffer, int], int]], Link]]" = None

# PIDs of the children whose end was not reported yet.
_running: "Set[int]" = set()


def phase(name: str) -> None:
    """Report that a phase begins; it lasts until the next one does."""
    if report is not None:
        report("phase: " + name)


def child_began(child: "subprocess.Popen[bytes]") -> None:
    """Report the start of a child process."""
    if report is not None:
        _running.add(child.pid)
        report("child {} began: {}".format(child.pid, _program(child)))


def child_ended(child: "subprocess.Popen[bytes]") -> None:
    """Report, once, how a child process ended, or that it still runs and is left alone."""
    if report is not None and child.pid in _running:
        _running.discard(child.pid)
        how = "is left alone" if child.returncode is None else "ended: {}".format(child.returncode)
        report("child {} {}".format(child.pid, how))


def _program(child: "subprocess.Popen[bytes]") -> str:
    """Return only the name of the program: its arguments may be private."""
    words = child.args
    program = words[0] if isinstance(words, (list, tuple)) else words
    return os.path.basename(os.fsdecode(program)) if isinstance(program, (str, bytes)) else "?"
