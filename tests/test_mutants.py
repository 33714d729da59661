"""`make mutants`: what it changes, and how its list of the living is read. (The mutants themselves take two hours.)"""

import ast
from pathlib import Path

import pytest

from tests.mutants import __main__ as runner
from tests.mutants.mutations import mutants

TIMEOUT_S = 120.0

SOURCE = '''\
"""Words."""

LIMIT: int = 3


class Door:
    """Words."""

    def opens(self, key: "int | None" = 5, *, twice: bool = False) -> bool:
        """Words."""
        if not key:
            raise ValueError(f"no key {1 + 1}")
        while twice and key < LIMIT <= 9:
            key += 1
            if key is None:
                break
        self.knock(key * 2)
        return max(key, 7) in (1, 2)
'''
FOUND = [
    "module: `3` -> `(4)`",
    "Door.opens: `5` -> `(6)`",
    "Door.opens: `False` -> `(True)`",
    "Door.opens: `not key` -> `(key)`",
    'Door.opens: `raise ValueError(f"no key {1 + 1}")` -> `pass`',
    "Door.opens: `twice and key < LIMIT <= 9` -> `(twice or key < LIMIT <= 9)`",
    "Door.opens: `key < LIMIT <= 9` -> `(key <= LIMIT <= 9)`",
    "Door.opens: `key < LIMIT <= 9` -> `(key < LIMIT < 9)`",
    "Door.opens: `9` -> `(10)`",
    "Door.opens: `key += 1` -> `key -= 1`",
    "Door.opens: `key += 1` -> `pass`",
    "Door.opens: `1` -> `(2)`",
    "Door.opens: `key is None` -> `(key is not None)`",
    "Door.opens: `break` -> `continue`",
    "Door.opens: `self.knock(key * 2)` -> `pass`",
    "Door.opens: `key * 2` -> `(key // 2)`",
    "Door.opens: `2` -> `(3)`",
    "Door.opens: `return max(key, 7) in (1, 2)` -> `return None`",
    "Door.opens: `max(key, 7) in (1, 2)` -> `(max(key, 7) not in (1, 2))`",
    "Door.opens: `max(key, 7)` -> `(min(key, 7))`",
    "Door.opens: `7` -> `(8)`",
    "Door.opens: `1` -> `(2)` (2)",
    "Door.opens: `2` -> `(3)` (2)",
]


def test_each_place_is_changed_once_but_for_words_and_types() -> None:
    assert [mutant.key for mutant in mutants(SOURCE)] == FOUND


def test_each_mutant_is_python_and_differs_in_one_place() -> None:
    whole = ast.dump(ast.parse(SOURCE))
    for mutant in mutants(SOURCE):
        assert ast.dump(ast.parse(mutant.source)) != whole
        changed = [
            pair for pair in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True) if len({*pair}) > 1
        ]
        assert len(changed) == 1 and SOURCE.splitlines()[mutant.line - 1] == changed[0][0]


@pytest.mark.parametrize("module", runner.TESTS)
def test_what_the_list_explains_is_a_mutant_of_its_module(module: str) -> None:
    path = runner.ROOT / "blockdiff" / f"{module}.py"
    keys = {mutant.key for mutant in mutants(path.read_text())}
    for entry in runner.explained(module):
        assert any(entry.startswith(f"{key}: ") for key in keys), entry


def test_a_mutant_is_found_in_a_copy_and_what_is_not_changed_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(runner.TESTS, "transport/address", ("test_address",))
    source = (runner.ROOT / "blockdiff" / "transport" / "address.py").read_text()
    copy = runner.Copy(tmp_path, "transport/address")
    assert copy.passes(source, TIMEOUT_S)
    *_, wrong = (mutant for mutant in mutants(source) if mutant.new == "return None")
    assert not copy.passes(wrong.source, TIMEOUT_S)
