"""How chains are doing, for monitoring: a state in the words of Nagios plug-ins, and the figures behind it.

From a cheap look at the files, as `listing` has it: what they hold is for `verify`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from enum import IntEnum

from blockdiff import listing
from blockdiff.chain import Chain
from blockdiff.errors import BlockdiffError, DamagedError, printable

#: What ``backup --chain`` appends to a NAME.
_PERIOD = r"-([0-9]{6}|[0-9]{8}|[0-9]{4}W[0-9]{2})"

#: How far clocks may differ before a time that is still to come is told, in seconds.
_CLOCK_S = 300.0


class State(IntEnum):
    """The states and exit statuses of Nagios plug-ins."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


#: From good to bad: a failure that is known is worse than what could not be looked at.
_ORDER = (State.OK, State.WARNING, State.UNKNOWN, State.CRITICAL)


@dataclass(frozen=True)
class Status:
    """How the chain `name` is doing; `text` says it in words.

    `generation` is the last complete one, finished at `finished`, in seconds since the epoch, and `age_s` seconds ago.
    `stored_bytes` is what all generations take. All are None where nothing tells.
    """

    name: str
    state: State
    text: str
    generation: int | None = None
    finished: float | None = None
    age_s: float | None = None
    image_bytes: int | None = None
    stored_bytes: int | None = None


def look(name: str, max_age_s: float, now: float) -> Status:
    """Return how the chain `name` is doing; of chains ``NAME-DATE`` (``backup --chain``), the newest one.

    Its last generation must not be older than `max_age_s`, at the time `now`, in seconds since the epoch.
    """
    try:
        found = [_look(each, max_age_s, now) for each in _chains(name)]
    except BlockdiffError as error:
        return Status(name, State.UNKNOWN, printable(error.message))
    if not found:
        return Status(name, State.CRITICAL, "there is no chain of this name")
    return max(found, key=lambda status: status.finished or 0.0)


def worst(found: Iterable[Status]) -> State:
    """Return the worst state of all."""
    return max((status.state for status in found), key=_ORDER.index)


def _chains(name: str) -> Iterator[str]:
    """Yield the names of the chains that `name` stands for and that are there."""
    with Chain(name) as chain:
        if chain.generations or chain.has_version_file:
            yield name
            return
        pattern = re.compile(re.escape(chain.base) + _PERIOD + r"\.ver")
        bases = [each[: -len(".ver")] for each in chain.directory.names() if pattern.fullmatch(each)]
    for base in bases:
        yield os.path.join(os.path.dirname(name), base)


def _look(name: str, max_age_s: float, now: float) -> Status:
    with Chain(name) as chain:
        found = listing.entries(chain)
        try:
            last = chain.last()
        except DamagedError as error:
            return Status(name, State.CRITICAL, printable(error.message))
    newest = next((entry for entry in found if entry.generation == last), None)
    finished = _seconds(newest.when if newest is not None else None)
    if newest is None or finished is None:
        return Status(name, State.CRITICAL, "it has no complete generation")
    age_s = now - finished
    state, text = _judge(found, newest, age_s, max_age_s)
    stored = sum(entry.stored or 0 for entry in found)
    return Status(name, state, text, last, finished, age_s, newest.image_size, stored)


def _judge(found: list[listing.Entry], newest: listing.Entry, age_s: float, max_age_s: float) -> tuple[State, str]:
    bad = [entry for entry in found if entry.state in (listing.DAMAGED, listing.MISSING)]
    if bad:
        numbers = ", ".join(str(entry.generation) for entry in bad[:5]) + (", …" if len(bad) > 5 else "")
        return State.CRITICAL, f"generation {numbers} {bad[0].state}: {bad[0].problem}"
    what = f"generation {newest.generation} is {age(age_s)} old"
    if age_s > max_age_s:
        return State.CRITICAL, f"{what}, more than {age(max_age_s)}"
    if age_s < -_CLOCK_S:
        return State.WARNING, f"generation {newest.generation} is from the future: is the clock right?"
    if newest.state == listing.NO_MANIFEST and any(entry.state == listing.OK for entry in found):
        return State.WARNING, f"{what}, and has no manifest, unlike others before it"
    if any(entry.state == listing.INCOMPLETE for entry in found):
        return State.WARNING, f"{what}, and a run after it was cut off"
    return State.OK, what


def _seconds(when: str | None) -> float | None:
    """Return a time of the listing in seconds since the epoch."""
    try:
        time = datetime.fromisoformat(when or "")
    except ValueError:
        return None
    return (time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)).timestamp()


def age(seconds: float) -> str:
    """Return a length of time for people: the two largest units of it."""
    minutes = max(0, int(seconds)) // 60
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes % 60}min" if hours else f"{minutes}min"


def nagios(found: list[Status], max_age_s: float) -> str:
    """Return the line of a Nagios plug-in: the worst first, and the ages as performance data."""
    state = worst(found)
    ordered = sorted(found, key=lambda status: _ORDER.index(status.state), reverse=True)
    shown = [status for status in ordered if status.state != State.OK] if state != State.OK else ordered
    text = "; ".join(f"{_plain(status.name)}: {_plain(status.text)}" for status in shown)
    data = [f"'{_plain(s.name)}'={max(0, int(s.age_s))}s;;{int(max_age_s)}" for s in found if s.age_s is not None]
    return f"BLOCKDIFF {state.name} - {text}" + (f" | {' '.join(data)}" if data else "")


def _plain(text: str) -> str:
    """Return a text that has none of the characters that mean something in the line of a plug-in."""
    return printable(text).replace("|", "/").replace("'", "").replace("=", "-")


def tap(found: list[Status]) -> str:
    """Return the lines of the Test Anything Protocol, one test for each chain."""
    lines = ["TAP version 13", f"1..{len(found)}"]
    for number, status in enumerate(found, 1):
        result = "ok" if status.state == State.OK else "not ok"
        text = f"{printable(status.name)}: {status.text}".replace("#", "\\#")
        lines.append(f"{result} {number} - {text}")
    return "\n".join(lines)


def prometheus(found: list[Status]) -> str:
    """Return the metrics in Prometheus' text format."""
    rows: list[tuple[str, str, list[tuple[Status, float | None]]]] = [
        ("state", "0 ok, 1 warning, 2 critical, 3 unknown", [(s, s.state) for s in found]),
        ("last_generation", "Number of the last complete generation", [(s, s.generation) for s in found]),
        ("last_finished_timestamp_seconds", "When that was finished", [(s, s.finished) for s in found]),
        ("image_bytes", "Size of its image", [(s, s.image_bytes) for s in found]),
        ("stored_bytes", "Size of all generations", [(s, s.stored_bytes) for s in found]),
    ]
    lines = []
    for name, text, values in rows:
        lines += [f"# HELP blockdiff_{name} {text}.", f"# TYPE blockdiff_{name} gauge"]
        lines += [
            f'blockdiff_{name}{{chain="{_label(s.name)}"}} {value:.0f}' for s, value in values if value is not None
        ]
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')
