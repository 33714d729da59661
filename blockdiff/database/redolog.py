"""Wait for InnoDB's redo log: with ``innodb_flush_log_at_trx_commit=0``, commits are written to it once a second.

A snapshot that is taken before that lacks the last commits, but the binary log has them. A replica that begins at the
coordinates of that moment would never get them. Statements such as ``FLUSH ENGINE LOGS`` do not help.
"""

import re
import time

from blockdiff.database.coordinates import Rows
from blockdiff.shared.errors import DatabaseError

TIMEOUT_S = 10.0
_POLL_INTERVAL_S = 0.02
_NUMBERS = re.compile(r"Log sequence number\s+([0-9]+)\b.*\bLog flushed up to\s+([0-9]+)\b", re.DOTALL)


def is_late(rows: Rows) -> bool:
    """Return whether the server reports commits before it writes them. Raises `DatabaseError`."""
    found = rows("SHOW GLOBAL VARIABLES LIKE 'innodb\\_flush\\_log\\_at\\_trx\\_commit'")
    return any(str(row["Value"]) == "0" for row in found)


def check(rows: Rows, hold_s: float) -> None:
    """Raise `DatabaseError` if the wait could be longer than `TIMEOUT_S`, or than the lock can be held (`hold_s`)."""
    if not is_late(rows):
        return
    found = rows("SHOW GLOBAL VARIABLES LIKE 'innodb\\_flush\\_log\\_at\\_timeout'")
    interval_s = max((int(str(row["Value"])) for row in found), default=1)
    limit_s = min(TIMEOUT_S, hold_s)
    if interval_s >= limit_s:
        raise DatabaseError(
            f"InnoDB writes its redo log only every {interval_s} s, and the lock would have to be held until then:"
            f" {limit_s:g} s is the limit (--max-hold is {hold_s:g} s)",
            "set innodb_flush_log_at_trx_commit=1 or =2 there, or innodb_flush_log_at_timeout=1",
        )


def wait(rows: Rows) -> None:
    """Wait until everything that is committed now is written. Raises `DatabaseError` if that takes too long."""
    deadline = time.monotonic() + TIMEOUT_S
    committed, written = _numbers(rows)
    while written < committed:
        if time.monotonic() > deadline:
            raise DatabaseError(
                f"InnoDB has not written its redo log for {TIMEOUT_S:g} s while the database was locked",
                "set innodb_flush_log_at_trx_commit=1 or =2 there: each commit is then written at once",
            )
        time.sleep(_POLL_INTERVAL_S)
        _, written = _numbers(rows)


def _numbers(rows: Rows) -> tuple[int, int]:
    """Return the sequence number at the end of the log, and that up to which the log is written."""
    for row in rows("SHOW ENGINE INNODB STATUS"):
        match = _NUMBERS.search(str(row["Status"]))
        if match is not None:
            return int(match[1]), int(match[2])
    raise DatabaseError(
        "InnoDB does not say how much of its redo log is written",
        "set innodb_flush_log_at_trx_commit=1 or =2 there: blockdiff then need not know",
    )
