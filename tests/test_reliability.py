"""The promises in docs/reliability.md name tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "reliability.md").read_text()


def test_every_test_that_a_promise_names_exists() -> None:
    named = re.findall(r"`((?:lab/)?test_\w+\.py)(?:::(test_\w+))?`", TEXT)
    assert len(named) > 15
    for file, function in named:
        assert f"def {function}(" in (TESTS / file).read_text() or not function, f"{file}::{function}"


def test_every_promise_names_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith(("| ---", "| promise"))]
    assert all(".py" in row for row in rows)
