"""What is known about an image's consistency, and the warning if it may not be one point in time."""

from blockdiff.session.rules import Totals
from blockdiff.shared.errors import printable

# In this order: the source was not in use, and nothing wrote to it while it was read; something wrote to it; it was in
# use but no write was seen, or that is unknown; the image is one point in time, as after a power cut; writers were
# stopped at that point in time, or while it was read.
STILL = "still"
CHANGING = "changing"
LIVE = "live"
SNAPSHOT = "snapshot"
QUIESCED = "quiesced"

_MIXED = "this generation may not be one point in time"


def of(totals: Totals, through_snapshot: bool, quiesced: bool) -> str:
    """Return the consistency of an image, from what the agent saw; `quiesced` says whether writers were stopped."""
    if through_snapshot:
        return QUIESCED if quiesced else SNAPSHOT
    if totals.touched:
        return CHANGING
    if quiesced:
        return QUIESCED
    return LIVE if totals.touched is None or totals.how else STILL


def warning(path: str, kind: str, totals: Totals, consistency: str, quiesced: bool) -> str | None:
    """Return the warning for a source at `path` that is a `kind` (``file`` or ``device``); None if there is none."""
    if consistency not in (CHANGING, LIVE):
        return None
    advice = "use --lvm, or freeze it with --before and --after"
    if kind == "file":
        advice = "back up a snapshot, or freeze it with --before and --after"
    if quiesced:
        advice = "--before did not freeze it"
    if consistency == CHANGING:
        effect = _MIXED
    elif totals.touched is None:
        effect = "if it was, " + _MIXED
    else:
        effect = "what was not on the disk yet when it was read is missing"
    return f"{printable(path)} {totals.how}: {advice}; {effect}"
