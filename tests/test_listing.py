"""What `blockdiff list` says: a table for people, JSON for programs, and the states."""

import json
import re
from pathlib import Path

import pytest

from blockdiff.backup import Options
from tests import chains, commands, faults
from tests.chains import BLOCK, DAYS, SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def rows(chain: SmallChain, status: int = 0) -> list[list[str]]:
    """Return the cells of the table, its head included."""
    result = commands.run("blockdiff", "list", chain.name)
    assert (result.returncode, result.stderr) == (status, b""), result
    return [re.split(r" {2,}", line.strip()) for line in result.stdout.decode().splitlines()]


def states(chain: SmallChain, status: int = 0) -> list[str]:
    return [row[-1] for row in rows(chain, status)[1:]]


def test_the_table_has_a_row_for_each_generation(chain: SmallChain) -> None:
    chain.add(b"x" * 100_000, Options(full=True))
    head, *found = rows(chain)
    assert head == ["gen", "when", "kind", "image", "changed", "stored", "consistency", "state"]
    assert [row[0] for row in found] == ["1", "2", "3", "4"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", row[1]) for row in found)
    assert [row[2] for row in found] == ["full", "incremental", "incremental", "full"]
    assert [row[3] for row in found] == ["384 bytes", "394 bytes", "319 bytes", "97.7 KiB"]
    assert [row[4] for row in found] == ["384 bytes", "192 bytes", "128 bytes", "97.7 KiB"]
    assert [row[6:] for row in found] == [["still", "ok"]] * 4


def test_json_has_the_same_in_bytes(chain: SmallChain) -> None:
    found = json.loads(commands.done("blockdiff", "list", "--json", chain.name))
    assert [entry["generation"] for entry in found] == [1, 2, 3]
    stored = sum(chain.file(suffix).stat().st_size for suffix in (".2.gz", ".2.sha256", ".2.json"))
    expected = {
        "full": False,
        "image_size": len(DAYS[1]),
        "changed": 3 * BLOCK,
        "stored": stored,
        "consistency": "still",
        "state": "ok",
        "problem": None,
        "source": str(chain.source),
        "digest": "sha256",
        "block_size": BLOCK,
        "format": 2,
    }
    assert expected.items() <= found[1].items()


def test_one_generation_is_listed_by_its_number(chain: SmallChain) -> None:
    found = json.loads(commands.done("blockdiff", "list", "--json", f"{chain.name}@2"))
    assert [entry["generation"] for entry in found] == [2]


def test_a_chain_of_the_original_has_no_manifests(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    chains.without_manifests(chain)
    head, *found = rows(chain)
    assert len(head) == 8
    assert [row[2:5] for row in found] == [["-", "-", "-"]] * 3
    assert states(chain) == ["no manifest"] * 3
    entries = json.loads(commands.done("blockdiff", "list", "--json", chain.name))
    assert [entry["digest"] for entry in entries] == ["md5"] * 3 and entries[0]["when"] is not None


@pytest.mark.parametrize("suffix", [".2.gz", ".2.sha256", ".2.json"])
def test_a_generation_that_lacks_a_file_is_damaged(chain: SmallChain, suffix: str) -> None:
    chain.file(suffix).unlink()
    first, second, third = states(chain, 5)
    assert (first, third) == ("ok", "ok")
    assert second == f"damaged: {chain.file(suffix)} is missing"


def test_a_file_of_another_size_and_a_flipped_manifest_are_damaged(chain: SmallChain) -> None:
    chain.file(".1.gz").write_bytes(b"short")
    chain.file(".3.json").write_bytes(chain.file(".3.json").read_bytes().replace(b'"still"', b'"stilL"'))
    first, second, third = states(chain, 5)
    assert first.startswith(f"damaged: {chain.file('.1.gz')} has 5 bytes instead of ")
    assert second == "ok"
    assert third == f"damaged: {chain.file('.3.json')} is damaged: its checksum does not match"


def test_missing_generations_are_listed_as_one_gap(chain: SmallChain) -> None:
    chain.add(DAYS[0])
    for number in (2, 3):
        for path in chain.directory.glob(f"disk.{number}.*"):
            path.unlink()
    assert states(chain, 5) == ["ok", "missing: none of the files of generations 2 to 3 is there", "ok"]
    for path in chain.directory.glob("disk.4.*"):
        path.unlink()
    assert states(chain, 5) == ["ok", "missing: none of the files of generations 2 to 4 is there"]


def test_a_run_that_was_cut_off_is_incomplete_and_no_damage(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[0])
    assert states(chain) == [
        *["ok"] * 3,
        "incomplete: a run was cut off here; the next one moves these files aside",
    ]


def test_first_generations_that_are_gone_are_missing_unless_the_oldest_is_full(chain: SmallChain) -> None:
    chain.add(DAYS[0], Options(block_size=BLOCK, full=True))
    chain.add(DAYS[1])
    for path in chain.directory.glob("disk.[12].*"):  # as by find -mtime +30 -delete
        path.unlink()
    assert states(chain, 5) == ["missing: none of the files of generations 1 to 2 is there", "ok", "ok", "ok"]
    for path in chain.directory.glob("disk.3.*"):
        path.unlink()
    assert states(chain) == ["ok", "ok"]


# The same words in `verify --json`


def test_verify_says_the_same_of_each_generation(chain: SmallChain) -> None:
    found = json.loads(commands.done("blockdiff", "verify", "--json", chain.name))
    assert found == [{"generation": n, "state": "ok", "problem": None, "hint": None} for n in (1, 2, 3)]
    chain.file(".2.gz").write_bytes(b"cut")
    result = commands.run("blockdiff", "verify", "--json", f"{chain.name}@2")
    listed = json.loads(commands.run("blockdiff", "list", "--json", chain.name).stdout)[1]
    (only,) = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (5, b"")
    assert {key: only[key] for key in ("generation", "state", "problem")} == {
        key: listed[key] for key in ("generation", "state", "problem")
    }
    for path in chain.directory.glob("disk.2.*"):
        path.unlink()
    result = commands.run("blockdiff", "verify", "--json", chain.name)
    assert result.returncode == 5
    assert [entry["state"] for entry in json.loads(result.stdout)] == ["ok", "missing", "damaged"]


def test_verify_says_where_the_source_differs(chain: SmallChain) -> None:
    words = ["verify", "--json", "--source", str(chain.source), chain.name]
    found = json.loads(commands.done("blockdiff", *words))
    size = len(chain.images[3])
    expected = {"generation": 3, "source": str(chain.source), "ranges": [], "image_size": size, "source_size": size}
    assert found == expected
    chain.source.write_bytes(b"x" + chain.images[3][1:])
    result = commands.run("blockdiff", *words)
    assert (result.returncode, json.loads(result.stdout)) == (1, {**expected, "ranges": [[0, chains.BLOCK]]})
