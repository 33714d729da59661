"""What `blockdiff list DIRECTORY` shows: one entry for each chain. Deltas and digest tables are not read."""

import os
from dataclasses import dataclass

from blockdiff.chain import clock, listing
from blockdiff.chain.generations import Chain
from blockdiff.chain.periods import Place
from blockdiff.shared.errors import DamagedError, StorageError

#: The state of a chain whose first run is still running.
AT_WORK = "first run at work"


@dataclass(frozen=True)
class ChainEntry:
    """One chain: its last complete generation, when that was finished (`when`), and how many seconds ago (`age_s`).

    `stored` is the size of all generations in bytes. What is not known is None; `name` and `state` never are.
    """

    name: str
    state: str
    problem: str | None = None
    source: str | None = None
    generation: int | None = None
    when: str | None = None
    age_s: int | None = None
    image_size: int | None = None
    stored: int | None = None


def chains_in(directory: str, now: float) -> list[ChainEntry]:
    """Return an entry for each chain in `directory`, at the time `now` in seconds; raises `StorageError`."""
    place = Place(directory)
    found = []
    for base in place.inventory.bases():
        try:
            found.append(_entry(place, base, now))
        except StorageError as error:  # a chain that cannot be read must not hide the others
            found.append(ChainEntry(os.path.join(directory, base), listing.DAMAGED, error.message))
    for base in place.inventory.without_generations():
        with place.chain(os.path.join(directory, base)) as chain:
            if chain.is_busy():
                found.append(ChainEntry(chain.name, AT_WORK))
    return sorted(found, key=lambda entry: entry.name)


def _entry(place: Place, base: str, now: float) -> ChainEntry:
    with place.chain(os.path.join(place.path, base)) as chain:
        entries = listing.entries(chain)
        try:
            last = chain.last()
        except DamagedError as error:
            return ChainEntry(chain.name, listing.DAMAGED, error.message, stored=_stored(entries))
        newest = next((entry for entry in entries if entry.generation == last), None)
        state, problem = _state(chain, entries, newest)
        if newest is None:
            return ChainEntry(chain.name, state, problem, stored=_stored(entries))
        finished = clock.seconds(newest.when)
        return ChainEntry(
            chain.name,
            state,
            problem,
            source=newest.source,
            generation=newest.generation,
            when=newest.when,
            age_s=None if finished is None else int(now - finished),
            image_size=newest.image_size,
            stored=_stored(entries),
        )


def _state(chain: Chain, entries: list[listing.Entry], newest: listing.Entry | None) -> tuple[str, str | None]:
    """Return the state of a chain: that of its newest generation, unless one is missing or damaged."""
    for entry in entries:
        if entry.state in (listing.DAMAGED, listing.MISSING):
            return entry.state, f"generation {entry.generation}: {entry.problem}"
    if newest is not None:
        return newest.state, None
    if chain.is_busy():
        return AT_WORK, None
    return listing.MISSING, "it has no complete generation"


def _stored(entries: list[listing.Entry]) -> int:
    return sum(entry.stored or 0 for entry in entries)
