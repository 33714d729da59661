"""The time, in the one form that manifests have."""

from datetime import datetime, timezone


def now() -> str:
    """Return the time in UTC as ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
