"""What is known of an image's consistency, and what is said to the user if it may not be that of one moment."""

from blockdiff.session.rules import Totals
from blockdiff.shared.errors import printable

# Nothing wrote to the source while it was read, and nobody used it; something wrote to it; it was in use, although
# nothing was seen to write to it, or nobody can know; the image is that of one moment, as after a power cut; and what
# writes to it was stopped at that moment, or while it was read.
STILL = "still"
CHANGING = "changing"
LIVE = "live"
SNAPSHOT = "snapshot"
QUIESCED = "quiesced"

_MIXED = "this generation may not be one point in time"


def of(totals: Totals, through_snapshot: bool, quiesced: bool) -> str:
    """Return the consistency of an image, from what the agent saw; `quiesced` is whether writers were stopped."""
    if through_snapshot:
        return QUIESCED if quiesced else SNAPSHOT
    if totals.touched:
        return CHANGING
    if quiesced:
        return QUIESCED
    return LIVE if totals.touched is None or totals.how else STILL


def warning(path: str, kind: str, totals: Totals, consistency: str, quiesced: bool) -> str | None:
    """Return what to warn of, for a source at `path` that is a `kind` (``file`` or ``device``); None for nothing."""
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
