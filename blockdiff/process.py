"""Run and stop child processes, always with a deadline and never through a shell.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import signal
import subprocess
from typing import Dict, List, NamedTuple, Optional, Sequence, Union

from blockdiff.errors import ProcessError, printable

Argument = Union[str, bytes]

#: How long a child that was told to end may take before it is killed, in seconds.
STOP_TIMEOUT_S = 5.0


class Completed(NamedTuple):
    """What a child process printed."""

    stdout: bytes
    stderr: bytes


def shown(arguments: Sequence[Argument]) -> str:
    """Return a command line for a message."""
    words = [word.decode("utf-8", "replace") if isinstance(word, bytes) else word for word in arguments]
    return printable(" ".join(words), 300)


def status_text(returncode: int) -> str:
    """Return how a process ended, in words: ``exited with status 3`` or ``died of signal 9 (SIGKILL)``."""
    if returncode >= 0:
        return "exited with status {}".format(returncode)
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "unknown"
    return "died of signal {} ({})".format(-returncode, name)


def run(
    arguments: Sequence[Argument],
    timeout_s: float,
    stdin: Optional[bytes] = None,
    env: Optional[Dict[str, str]] = None,
) -> Completed:
    """Run a command to its end and return what it printed.

    Raises `ProcessError` when it cannot be started, fails (its last line of standard error is in the message), or is
    not done after `timeout_s` seconds; it is then stopped first.
    """
    try:
        child = subprocess.Popen(
            list(arguments),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
    except OSError as error:
        raise ProcessError("cannot start {}: {}".format(shown(arguments), error.strerror or error)) from error
    with child:
        try:
            stdout, stderr = child.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            stop(child)
            raise ProcessError("{} was not done after {:g} s".format(shown(arguments), timeout_s)) from error
        except BaseException:  # a signal: no child may outlive us
            stop(child)
            raise
    if child.returncode != 0:
        lines: List[str] = stderr.decode("utf-8", "replace").strip().splitlines()
        said = ": " + printable(lines[-1], 500) if lines else ""
        raise ProcessError("{} {}{}".format(shown(arguments), status_text(child.returncode), said))
    return Completed(stdout, stderr)


def stop(child: "subprocess.Popen[bytes]", timeout_s: float = STOP_TIMEOUT_S) -> None:
    """End a child: SIGTERM, then SIGKILL where `timeout_s` seconds did not do; returns when it is gone."""
    if child.poll() is not None:
        return
    child.terminate()
    try:
        child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
