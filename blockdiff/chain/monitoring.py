"""The status of chains, for monitoring: a state as Nagios plug-ins have it, and numbers.

It is found as in `listing`: the deltas and digest tables are not read. `verify` reads them.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from blockdiff.chain import clock, listing
from blockdiff.chain.generations import Chain
from blockdiff.chain.periods import Place
from blockdiff.shared.errors import BlockdiffError, BusyError, DamagedError, printable

#: The values of a generation's consistency that cause a warning: the reason, and what to do.
_TORN = {
    "live": "the source was in use while it was read; use --lvm, or freeze it with --before and --after",
    "changing": "it was written to while it was read; back up a snapshot, with --lvm",
}


class State(IntEnum):
    """The states and exit statuses of Nagios plug-ins."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


#: From good to bad: a known failure is worse than a state that is not known.
_ORDER = (State.OK, State.WARNING, State.UNKNOWN, State.CRITICAL)


@dataclass(frozen=True)
class Status:
    """The status of the chain of the NAME `name`; `text` says it in words.

    `chain` is NAME itself, or the newest ``NAME-DATE`` of ``backup --chain``. `generation` is the last complete one. It
    was finished at `finished`, in seconds since the epoch, which was `age_s` seconds ago. `succeeded` is when the last
    generation was finished that has all its files. `stored_bytes` is the size of all generations. What is not known is
    None.
    """

    name: str
    state: State
    text: str
    chain: str | None = None
    generation: int | None = None
    finished: float | None = None
    age_s: float | None = None
    succeeded: float | None = None
    image_bytes: int | None = None
    stored_bytes: int | None = None


def look_at_all(names: Iterable[str], max_age_s: float, now: float) -> list[Status]:
    """Return the status of each NAME; each directory is listed once."""
    places: dict[str, Place | BlockdiffError] = {}
    found = []
    for name in names:
        directory = os.path.dirname(name)
        if directory not in places:
            places[directory] = _place(directory)
        found.append(_look_in(places[directory], name, max_age_s, now))
    return found


def look(name: str, max_age_s: float, now: float) -> Status:
    """Return the status of the NAME `name`: that of the newest of NAME itself and its ``NAME-DATE``.

    The state is critical if its last generation is more than `max_age_s` seconds older than `now`, which is in seconds
    since the epoch.
    """
    return _look_in(_place(os.path.dirname(name)), name, max_age_s, now)


def _place(directory: str) -> "Place | BlockdiffError":
    try:
        return Place(directory)
    except BlockdiffError as error:
        return error


def _look_in(place: "Place | BlockdiffError", name: str, max_age_s: float, now: float) -> Status:
    if isinstance(place, BlockdiffError):
        return Status(name, State.UNKNOWN, _words(place))
    try:
        newest = place.newest(place.names(name), now)
        if newest is None:
            return _without_generations(place, name)
        with place.chain(newest) as chain:
            return _look(name, chain, max_age_s, now)
    except BlockdiffError as error:
        return Status(name, State.UNKNOWN, _words(error))


def _words(error: BlockdiffError) -> str:
    return error.message if error.hint is None else f"{error.message} ({error.hint})"


def _without_generations(place: Place, name: str) -> Status:
    """Return the status of a NAME without generations."""
    with place.chain(name) as chain:
        try:
            chain.generation(None)
        except BusyError as error:
            return Status(name, State.WARNING, error.message)
        except BlockdiffError as error:
            return Status(name, State.CRITICAL, error.message)
    raise AssertionError("a chain without generations has one")


def worst(found: Iterable[Status]) -> State:
    """Return the worst state of all."""
    return max((status.state for status in found), key=_ORDER.index)


def _look(name: str, chain: Chain, max_age_s: float, now: float) -> Status:
    found = listing.entries(chain)
    stored = sum(entry.stored or 0 for entry in found)
    sound = [clock.seconds(entry.when) for entry in found if entry.state in (listing.OK, listing.NO_MANIFEST)]
    succeeded = sound[-1] if sound else None
    try:
        last = chain.last()
    except DamagedError as error:
        return Status(name, State.CRITICAL, error.message, chain.name, succeeded=succeeded, stored_bytes=stored)
    newest = next((entry for entry in found if entry.generation == last), None)
    finished = clock.seconds(newest.when) if newest is not None else None
    if newest is None or finished is None:
        text = "it has no complete generation"
        return Status(name, State.CRITICAL, text, chain.name, succeeded=succeeded, stored_bytes=stored)
    age_s = now - finished
    state, text = _judge(found, newest, age_s, max_age_s)
    return Status(name, state, text, chain.name, last, finished, age_s, succeeded, newest.image_size, stored)


def _judge(found: list[listing.Entry], newest: listing.Entry, age_s: float, max_age_s: float) -> tuple[State, str]:
    bad = [entry for entry in found if entry.state in (listing.DAMAGED, listing.MISSING)]
    if bad:
        numbers = ", ".join(str(entry.generation) for entry in bad[:5]) + (", …" if len(bad) > 5 else "")
        return State.CRITICAL, f"generation {numbers} {bad[0].state}: {bad[0].problem}"
    what = f"generation {newest.generation} is {clock.shown_age(age_s)} old"
    if age_s > max_age_s:
        return State.CRITICAL, f"{what}, more than {clock.shown_age(max_age_s)}"
    if age_s < -clock.TOLERANCE_S:
        return State.WARNING, f"generation {newest.generation} is from the future: is the clock right?"
    doubt = _doubt(found, newest)
    return (State.OK, what) if doubt is None else (State.WARNING, f"{what}, {doubt}")


def _doubt(found: list[listing.Entry], newest: listing.Entry) -> str | None:
    """Return the reason for a warning about a newest generation that exists and is young enough; None if there is none.

    The reason continues a sentence.
    """
    before = next((entry.when for entry in found if entry.generation == newest.generation - 1), None)
    if (why := clock.went_back(newest.started, newest.when, before)) is not None:
        return f"but {why}"
    if newest.consistency in _TORN:
        return f"and may mix several moments ({newest.consistency}): {_TORN[newest.consistency]}"
    if newest.state == listing.NO_MANIFEST and any(entry.state == listing.OK for entry in found):
        return "and has no manifest, unlike others before it"
    if any(entry.state == listing.INCOMPLETE for entry in found):
        return "and a run after it was cut off"
    return None


def nagios(found: list[Status], max_age_s: float) -> str:
    """Return the line of a Nagios plug-in: the worst status first, and the ages as performance data."""
    state = worst(found)
    ordered = sorted(found, key=lambda status: _ORDER.index(status.state), reverse=True)
    shown = [status for status in ordered if status.state != State.OK] if state != State.OK else ordered
    text = "; ".join(f"{_plain(status.chain or status.name)}: {_plain(status.text)}" for status in shown)
    data = {f"'{_plain(s.name)}'": f"={max(0, int(s.age_s))}s;;{int(max_age_s)}" for s in found if s.age_s is not None}
    shown_data = " ".join(label + value for label, value in data.items())
    return f"BLOCKDIFF {state.name} - {text}" + (f" | {shown_data}" if data else "")


def _plain(text: str) -> str:
    """Return a text without the characters that have a meaning in the line of a plug-in."""
    return printable(text).replace("|", "/").replace("'", "").replace("=", "-")


def tap(found: list[Status]) -> str:
    """Return the lines of the Test Anything Protocol, one test for each NAME."""
    lines = ["TAP version 13", f"1..{len(found)}"]
    for number, status in enumerate(found, 1):
        result = "ok" if status.state == State.OK else "not ok"
        text = printable(f"{status.chain or status.name}: {status.text}").replace("\\", "\\\\").replace("#", "\\#")
        lines.append(f"{result} {number} - {text}")
    return "\n".join(lines)


def prometheus(found: list[Status]) -> str:
    """Return the metrics in Prometheus' text format, each with the labels ``name`` (NAME) and ``chain``."""
    rows: list[tuple[str, str, list[tuple[Status, float | None]]]] = [
        ("state", "0 ok, 1 warning, 2 critical, 3 unknown", [(s, s.state) for s in found]),
        ("last_generation", "Number of the last complete generation", [(s, s.generation) for s in found]),
        ("last_finished_timestamp_seconds", "When that was finished", [(s, s.finished) for s in found]),
        (
            "last_success_timestamp_seconds",
            "When the last generation was finished whose files are all there",
            [(s, s.succeeded) for s in found],
        ),
        ("image_bytes", "Size of the image of the last complete generation", [(s, s.image_bytes) for s in found]),
        ("stored_bytes", "Size of all generations", [(s, s.stored_bytes) for s in found]),
    ]
    lines = []
    for name, text, values in rows:
        lines += [f"# HELP blockdiff_{name} {text}.", f"# TYPE blockdiff_{name} gauge"]
        series = {_labels(status): value for status, value in values if value is not None}
        lines += [f"blockdiff_{name}{labels} {value:.0f}" for labels, value in series.items()]
    return "\n".join(lines) + "\n"


def _labels(status: Status) -> str:
    chain = "" if status.chain is None else f',chain="{_label(status.chain)}"'
    return f'{{name="{_label(status.name)}"{chain}}}'


def _label(text: str) -> str:
    """Return the value of a label as UTF-8; bytes that are not UTF-8 become ``\\xNN``."""
    clean = os.fsencode(text).decode("utf-8", "backslashreplace")
    escaped = {"\\": "\\\\", '"': '\\"', "\n": "\\n"}
    return "".join(escaped.get(c) or printable(c).replace("\\", "\\\\") for c in clean)
