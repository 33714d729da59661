"""The time, in the one form that manifests have; and clocks that go back."""

import time
from datetime import datetime, timezone

#: How far clocks may differ, in seconds, before it is reported.
TOLERANCE_S = 300.0


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return iso(time.time())


def iso(seconds: float) -> str:
    """Return a time, in seconds since the epoch, in UTC as ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def seconds(text: str | None) -> float | None:
    """Return a time of a manifest in seconds since the epoch; None for what is not one."""
    try:
        found = datetime.fromisoformat(text or "")
        return (found if found.tzinfo is not None else found.replace(tzinfo=timezone.utc)).timestamp()
    except (ValueError, OverflowError):
        return None


def went_back(started: str | None, finished: str | None, before: str | None) -> str | None:
    """Return in words that the clock went back during or before a run, as the times of its manifest say; or None.

    `before` is when the generation before it was finished.
    """
    end = seconds(finished)
    for earlier, what in ((started, "it was started"), (before, "the generation before it was finished")):
        begin = seconds(earlier)
        if begin is not None and end is not None and begin - end > TOLERANCE_S:
            return f"it was finished at {finished}, but {what} after that, at {earlier}: the clock is or was wrong"
    return None


def shown_age(seconds: float) -> str:
    """Return a length of time for people: the two largest units of it; "in the future" for one that is yet to pass."""
    if seconds < -TOLERANCE_S:
        return "in the future"
    minutes = max(0, int(seconds)) // 60
    days, hours = minutes // 1440, minutes // 60 % 24
    if days:
        return f"{days}d {hours}h"
    return f"{hours}h {minutes % 60}min" if hours else f"{minutes}min"
