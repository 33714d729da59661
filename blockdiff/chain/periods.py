"""The chains that belong to one NAME: NAME itself, and each ``NAME-DATE`` that ``backup --chain`` begins for it."""

import os
from collections.abc import Iterable

from blockdiff.chain import clock
from blockdiff.chain.durable import Directory
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import Inventory
from blockdiff.shared.errors import DamagedError, StorageError


class Place:
    """The directory `path`, which is listed once for all the chains in it. Raises `StorageError`."""

    def __init__(self, path: str) -> None:
        self.path = path
        with Directory(path or ".") as directory:
            self.inventory = Inventory(directory)

    def chain(self, name: str) -> Chain:
        """Return the chain `name`, which is in this directory."""
        return Chain(name, self.inventory)

    def names(self, name: str) -> list[str]:
        """Return the existing chains of the NAME `name`: NAME itself, then its periods.

        If NAME itself exists, a ``NAME-DATE`` of another source is left out: it has its name by chance.
        """
        base = os.path.basename(name)
        periods = [os.path.join(self.path, each) for each in self.inventory.periods(base)]
        if not self.inventory.has(base):
            return periods
        source = self._source(name)
        return [name, *(each for each in periods if None in (source, found := self._source(each)) or found == source)]

    def newest(self, names: Iterable[str], now: float) -> str | None:
        """Return the chain with the newest last generation; None if there is no chain. `now` is in seconds.

        A generation from the future, made while a clock was wrong, counts only if all are from the future.
        """

        def youth(name: str) -> tuple[bool, float]:
            finished = self._finished(name)
            return finished <= now + clock.TOLERANCE_S, finished

        return max(names, key=youth, default=None)

    def _source(self, name: str) -> tuple[str | None, str] | None:
        """Return host and path of the source in the last manifest, None if there is none or it is a command."""
        with self.chain(name) as chain:
            for generation in reversed(chain.generations.values()):
                known = generation.manifest
                if known is not None:
                    return None if known.source.kind == "command" else (known.source.host, known.source.path)
        return None

    def _finished(self, name: str) -> float:
        """Return when the last generation was finished, in seconds since the epoch; 0 if it is not known.

        If the chain has no manifest, it is when the newest of its files was written.
        """
        with self.chain(name) as chain:
            for generation in reversed(chain.generations.values()):
                if generation.manifest is not None:
                    return clock.seconds(generation.manifest.finished) or 0.0
            return max((written(each) or 0.0 for each in chain.generations.values()), default=0.0)


def written(generation: Generation) -> float | None:
    """Return when the newest file of a generation was written, in seconds; None if no file can be reached."""
    times = []
    for suffix in generation.suffixes:
        try:
            times.append(generation.directory.modified(generation.name(suffix)))
        except (DamagedError, StorageError):
            continue
    return max(times, default=None)


def later(name: str, period: str) -> str | None:
    """Return the last chain of a later period than that of `name`, in the same directory; None if there is none.

    `name` is a ``NAME-DATE`` and ends in `period`. Raises `StorageError`.
    """
    if not period:
        return None
    path, base = os.path.split(name)
    of = base.removesuffix(period)
    with Directory(path or ".") as directory:
        found = Inventory.of_periods(directory, of).periods(of)
    return max((os.path.join(path, each) for each in found if len(each) == len(base) and each > base), default=None)
