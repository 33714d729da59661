"""The bars: what they show, and that nothing is printed over them."""

import random
import re
from pathlib import Path

import pytest

from blockdiff.backup import Options
from tests import chains, terminal
from tests.chains import SmallChain

MIB = 1 << 20


@pytest.fixture
def chain(large_tmp_path: Path) -> SmallChain:
    """Two full generations and one that changes a MiB, of an image of 8 MiB."""
    chain = chains.new_chain(large_tmp_path)
    image = random.Random(1).randbytes(8 * MIB)
    chain.add(image, Options())
    chain.add(image, Options(full=True))
    chain.add(bytes(MIB) + image[MIB:], Options())
    return chain


def lines(shown: str) -> list[str]:
    """Return what stood on a line of the terminal at some time, without colours."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown))


@pytest.mark.parametrize(
    ("words", "total", "numbers"),
    [
        ((), "17 MiB", (1, 2, 3)),
        (("--deep",), "41 MiB", (1, 2, 3)),
        (("--subset", "1/2"), "9 MiB", (1, 3)),
        (("--subset", "2/2"), "8 MiB", (2,)),
        (("@3",), "9 MiB", (3,)),
    ],
)
def test_verify_shows_how_much_there_is_to_do_and_no_words_over_it(
    chain: SmallChain, words: tuple[str, ...], total: str, numbers: tuple[int, ...]
) -> None:
    name = chain.name + words[0] if words and words[0].startswith("@") else chain.name
    options = () if name != chain.name else words
    status, shown = terminal.run("blockdiff", "verify", *options, name)
    assert status == 0
    found = lines(shown)
    assert any(line.startswith("verify ") and f"{total} of {total}" in line for line in found), found
    assert [line for line in found if "ok" in line] == [f"generation {number}: ok" for number in numbers]


def test_without_manifests_there_is_no_total(chain: SmallChain) -> None:
    chain.add(None, Options(full=True))
    chain.file(".2.json").unlink()
    status, shown = terminal.run("blockdiff", "verify", chain.name)
    assert status == 5 and "generation 1: ok" in lines(shown)
    assert not any(" of 25 MiB" in line for line in lines(shown))


def test_a_bar_is_shown_where_only_standard_error_is_a_terminal(chain: SmallChain, tmp_path: Path) -> None:
    """And what is printed goes where it was led to."""
    listed = tmp_path / "listed"
    chain.file(".3.gz").unlink()
    status, shown = terminal.run(
        *("blockdiff", "restore", "--salvage", chain.name, chain.source.parent / "out"), stdout=listed
    )
    assert status == 5 and any(line.startswith("restore ") and "of 8 MiB" in line for line in lines(shown))
    assert listed.read_text() == f"0 {MIB}\n"
    status, shown = terminal.run("blockdiff", "verify", chain.name, stdout=listed)
    assert status == 5 and any(line.startswith("verify ") for line in lines(shown))
    assert listed.read_bytes() == b""
