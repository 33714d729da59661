"""What users write, in arguments and in the environment, and what it means."""

import os
import re
import shlex

import click

from blockdiff.shared.errors import UsageError, printable

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
            self.fail(f"{printable(str(value), 100)!r} is not a size; use a number followed by K, M or G", param, ctx)
        return int(match[1]) * _UNITS[match[2].upper()]


def agent_prefix() -> list[str] | None:
    """Return the command that runs the agent, from ``SSH_BLOCKDIFF_PREFIX``; None if it is not set.

    Raises `UsageError` for open quotes.
    """
    line = os.environ.get("SSH_BLOCKDIFF_PREFIX")
    if line is None:
        return None
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"SSH_BLOCKDIFF_PREFIX is not a command line: {error}") from error


def split_name(text: str) -> tuple[str, int | None]:
    """Return NAME and N of ``NAME@N``, None for N if there is no ``@N``."""
    match = re.fullmatch(r"(.+)@([1-9][0-9]{0,17})", text, re.DOTALL)
    return (match[1], int(match[2])) if match else (text, None)
