"""The chains that one NAME stands for: NAME itself, and the ``NAME-DATE`` that ``backup --chain`` begins of it."""

import os
from collections.abc import Iterable

from blockdiff.chain import clock
from blockdiff.chain.durable import Directory
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import Inventory
from blockdiff.shared.errors import DamagedError, StorageError


class Place:
    """The directory of a chain called `name`, looked at once, for all the chains in it. Raises `StorageError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        with Directory(path or ".") as directory:
            self.inventory = Inventory(directory)

    def chain(self, name: str) -> Chain:
        """Return the chain `name`, which is in this directory."""
        return Chain(name, self.inventory)

    def names(self, name: str) -> list[str]:
        """Return the chains that are there of the NAME `name`: itself, then its periods.

        If NAME itself is there, a ``NAME-DATE`` of another source has its name by chance.
        """
        base = os.path.basename(name)
        periods = [os.path.join(self.path, each) for each in self.inventory.periods(base)]
        if not self.inventory.has(base):
            return periods
        source = self._source(name)
        return [name, *(each for each in periods if None in (source, found := self._source(each)) or found == source)]

    def newest(self, names: Iterable[str], now: float) -> str | None:
        """Return the chain whose last generation is the youngest at the time `now`, in seconds; None for none.

        One from the future, which a wrong clock once made, is the youngest only if all are.
        """

        def youth(name: str) -> tuple[bool, float]:
            finished = self._finished(name)
            return finished <= now + clock.TOLERANCE_S, finished

        return max(names, key=youth, default=None)

    def _source(self, name: str) -> tuple[str | None, str] | None:
        """Return host and path of what the last generation is of, None if it is not known."""
        with self.chain(name) as chain:
            for generation in reversed(chain.generations.values()):
                known = generation.manifest
                if known is not None:
                    return None if known.source.kind == "command" else (known.source.host, known.source.path)
        return None

    def _finished(self, name: str) -> float:
        """Return when the last generation was finished, in seconds since the epoch, 0 if it is not known."""
        with self.chain(name) as chain:
            for generation in reversed(chain.generations.values()):
                if generation.manifest is not None:
                    return clock.seconds(generation.manifest.finished) or 0.0
            return max((written(each) or 0.0 for each in chain.generations.values()), default=0.0)


def written(generation: Generation) -> float | None:
    """Return when the files of a generation were written last, in seconds; None if none can be looked at."""
    times = []
    for suffix in generation.suffixes:
        try:
            times.append(generation.directory.modified(generation.name(suffix)))
        except (DamagedError, StorageError):
            continue
    return max(times, default=None)


def later(name: str, period: str) -> str | None:
    """Return the last of the chains beside ``NAME-DATE`` (`name`, which ends in `period`) that are of a later period.

    None if there is none. Raises `StorageError`.
    """
    if not period:
        return None
    path, base = os.path.split(name)
    of = base.removesuffix(period)
    with Directory(path or ".") as directory:
        found = Inventory.of_periods(directory, of).periods(of)
    return max((os.path.join(path, each) for each in found if len(each) == len(base) and each > base), default=None)
