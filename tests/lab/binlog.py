"""Replay what `mariadb-binlog --base64-output=decode-rows -v` prints of a log in the format ROW."""

import re
from collections import Counter
from collections.abc import Mapping

Row = tuple[str, ...]

_STATEMENT = re.compile(r"### (INSERT INTO|UPDATE|DELETE FROM) `shop`\.`(\w+)`")
_COLUMN = re.compile(r"###   @\d+=(.*?)(?: \(\d+\))?")  # of a negative number the unsigned one follows


def replayed(log: str, rows: Mapping[str, "Counter[Row]"]) -> "dict[str, Counter[Row]]":
    """Return the rows of each table of `shop`, columns as text, after the statements of `log`; before it had `rows`."""
    state = {table: Counter(found) for table, found in rows.items()}
    for statement, table, old, new in _changes(log):
        assert statement != "UPDATE" or (old and new), log[:1000]
        if old:
            assert state[table][old] > 0, f"{statement} of what is not there: {old}"
            state[table][old] -= 1
        if new:
            state[table][new] += 1
    return {table: +found for table, found in state.items()}


def _changes(log: str) -> "list[tuple[str, str, Row, Row]]":
    """Return statement, table, and the row before and after, () for none, of each change."""
    changes = []
    statement = table = ""
    images: dict[str, list[str]] = {}
    image = ""
    for line in [*log.splitlines(), "# end"]:
        begun = _STATEMENT.fullmatch(line)
        if statement and (begun or not line.startswith("###")):
            changes.append((statement, table, tuple(images.get("WHERE", ())), tuple(images.get("SET", ()))))
            statement = ""
        if begun:
            statement, table = begun.groups()
            images = {}
        elif line in ("### WHERE", "### SET"):
            image = line[4:]
        elif line.startswith("###   "):
            column = _COLUMN.fullmatch(line)
            assert column is not None, line
            images.setdefault(image, []).append(column[1].strip("'"))
    return changes
