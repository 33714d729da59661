"""Run the real commands, each in its own process."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

BIN = Path(__file__).resolve().parent.parent / "bin"
#: A PATH with which the commands are found by their names, and find the Python that runs the tests.
PATH = f"{BIN}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"


def run(
    *arguments: str | bytes | Path,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120,
    pass_fds: Sequence[int] = (),
    under: Sequence[str] = (),
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command of ``bin/`` (its first word) and return what it printed; the caller checks the exit status.

    `under` is a command that runs it, such as prlimit(1).
    """
    program = BIN / os.fsdecode(arguments[0])
    return subprocess.run(
        [*under, sys.executable, program, *arguments[1:]],
        input=stdin,
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **(env or {})},
        capture_output=True,
        timeout=timeout_s,
        pass_fds=pass_fds,
        check=False,
    )


def done(*arguments: str | bytes | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> bytes:
    """Run a command that must exit with 0 and print nothing on standard error; return its standard output."""
    result = run(*arguments, cwd=cwd, env=env)
    assert (result.returncode, result.stderr) == (0, b""), result
    return result.stdout


@contextmanager
def started(
    *arguments: str | bytes | Path, env: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """Yield a running command of ``bin/``; it is killed if it still runs at the end."""
    program = BIN / os.fsdecode(arguments[0])
    with subprocess.Popen(
        [sys.executable, program, *arguments[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PATH": PATH, **(env or {})},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
