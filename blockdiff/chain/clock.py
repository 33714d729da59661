"""The time, in the form that manifests use; and clocks that go back."""

import time
from datetime import datetime, timezone

#: Differences between clocks are reported if they are larger than this, in seconds.
TOLERANCE_S = 300.0


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return iso(time.time())


def iso(seconds: float) -> str:
    """Return a time, in seconds since the epoch, in UTC as ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def seconds(text: str | None) -> float | None:
    """Return a time from a manifest in seconds since the epoch; None if the text is not a time."""
    try:
        found = datetime.fromisoformat(text or "")
        return (found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def went_back(started: str | None, finished: str | None, before: str | None) -> str | None:
    """Return a phrase that says that the clock went back during or before a run; None if it did not.

    `started` and `finished` are from the run's manifest; `before` is when the previous generation was finished.
    """
    end = seconds(finished)
    for earlier, what in ((started, "it was started"), (before, "the generation before it was finished")):
        begin = seconds(earlier)
        if begin is not None and end is not None and begin - end > TOLERANCE_S:
            return f"it was finished at {finished}, but {what} after that, at {earlier}: the clock is or was wrong"
    return None


def shown_age(seconds: float) -> str:
    """Return an age for people, in its two largest units; "in the future" if it is below minus `TOLERANCE_S`."""
    if seconds < -TOLERANCE_S:
        return "in the future"
    minutes = max(0, int(seconds)) // 60
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes % 60}min" if hours else f"{minutes}min"
