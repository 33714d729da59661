"""Let the operating system fail, or the process die, at a chosen step of what `durable` does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from blockdiff.chain import durable

#: What changes a directory or makes a change durable.
STEPS = ("open", "write", "fsync", "link", "rename", "unlink")


class Crash(BaseException):
    """The process died here."""


class FaultyOs:
    """Stands in for the module `os`. Of the calls that are named in `steps`, number `at` (from 1) fails.

    It does so with the error `number`, or, for None, by `Crash`, after which every other step does as well. `failed`
    is the name of the call that failed.
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
    """Let what `durable` does fail as `FaultyOs` says."""
    faulty = FaultyOs(at, number, steps)
    with monkeypatch.context() as patch:
        patch.setattr(durable, "os", faulty)
        yield faulty
