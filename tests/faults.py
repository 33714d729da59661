"""Let a system call of `durable` fail, or the process die there, at a chosen step."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockdiff.chain import durable

#: The calls that change a directory, or make a change durable.
STEPS = ("open", "write", "fsync", "link", "rename", "unlink")


class Crash(BaseException):
    """Simulates that the process died here."""


class FaultyOs:
    """Replaces the module `os`. Of the calls whose names are in `steps`, number `at` (from 1) fails.

    It fails with the error `number`. If `number` is None, it raises `Crash`, and so does every later step. `failed` is
    the name of the call that failed.
    """

    def __init__(self, at: int, number: int | None, steps: tuple[str, ...] = STEPS) -> None:
        self.failed: str | None = None
        self._left = at
        self._number = number
        self._steps = steps

    def __getattr__(self, name: str) -> object:
        real = getattr(os, name)
        if name not in STEPS:
            return real

        def step(*arguments: object, **keywords: object) -> object:
            if name == "open" and not int(str(arguments[1])) & os.O_CREAT:
                return real(*arguments, **keywords)
            self._left -= name in self._steps
            if self._number is None and (self.failed or not self._left):
                self.failed = self.failed or name
                raise Crash
            if name in self._steps and not self._left:
                self.failed = name
                raise OSError(self._number, os.strerror(self._number or 0))
            return real(*arguments, **keywords)

        return step


@contextmanager
def at_step(
    monkeypatch: pytest.MonkeyPatch, at: int, number: int | None, steps: tuple[str, ...] = STEPS
) -> Iterator[FaultyOs]:
    """Let the system calls of `durable` fail as described in `FaultyOs`."""
    faulty = FaultyOs(at, number, steps)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", faulty)
        yield faulty
