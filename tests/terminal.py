"""Run a command on its own terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

from tests.commands import BIN, PATH


def run(*arguments: str | Path, timeout_s: float = 60, stdout: Path | None = None) -> tuple[int, str]:
    """Run a command of ``bin/`` on a terminal; return its exit status and what the terminal shows.

    All three standard streams are the terminal; with `stdout`, standard output is that file instead.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    environment = {**os.environ, "PATH": PATH, "TERM": "xterm", "COLUMNS": "160"}
    with (
        open(os.devnull if stdout is None else stdout, "wb") as file,
        subprocess.Popen(
            [sys.executable, BIN / str(arguments[0]), *arguments[1:]],
            stdin=slave,
            stdout=slave if stdout is None else file,
            stderr=slave,
            env=environment,
            start_new_session=True,
        ) as process,
    ):
        os.close(slave)
        shown = bytearray()
        try:
            while part := os.read(master, 65536):
                shown += part
        except OSError:
            pass  # the last process that had the other end open has closed it
        finally:
            os.close(master)
        return process.wait(timeout_s), shown.decode("utf-8", "replace")
