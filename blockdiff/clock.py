"""The time, in the one form that manifests have."""

import time
from datetime import datetime, timezone


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return iso(time.time())


def iso(seconds: float) -> str:
    """Return a time, in seconds since the epoch, in UTC as ISO 8601, to the second."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
