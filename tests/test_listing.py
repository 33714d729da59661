"""What `blockdiff list` says: a table for people, JSON for programs, and the states."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.chain import periods
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Chain
from blockdiff.shared.errors import StorageError
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
    expected["unrest"] = ""
    assert found == expected
    chain.source.write_bytes(b"x" + chain.images[3][1:])
    result = commands.run("blockdiff", *words)
    assert (result.returncode, json.loads(result.stdout)) == (1, {**expected, "ranges": [[0, chains.BLOCK]]})


# The chains of a directory, and of a NAME that was begun with --chain


def months(tmp_path: Path) -> SmallChain:
    """Return the NAME of two chains, ``disk-202610`` and ``disk-202611``, the second of two generations."""
    chain = chains.new_chain(tmp_path)
    old = SmallChain(chain.directory, chain.source, "disk-202610")
    new = SmallChain(chain.directory, chain.source, "disk-202611")
    old.add(DAYS[0])
    with Chain(old.name) as opened:
        known = opened.generations[1].manifest
        assert known is not None
    old.file(".1.json").write_bytes(replace(known, finished="2026-10-01T00:00:00+00:00").to_bytes())
    new.add(DAYS[1])
    new.add(DAYS[2])
    return chain


def test_the_newest_chain_of_a_name_is_listed_and_verified(tmp_path: Path) -> None:
    chain = months(tmp_path)
    listed = commands.run("blockdiff", "list", chain.name)
    note = f"blockdiff: note: {chain.name}-202611 is the newest chain of {chain.name}\n"
    assert (listed.returncode, listed.stderr.decode()) == (0, note)
    assert len(listed.stdout.splitlines()) == 3
    commands.done("blockdiff", "verify", chain.name)
    commands.done("blockdiff", "verify", "--source", chain.source, chain.name)
    (chain.directory / "disk-202611.2.gz").unlink()
    done = commands.run("blockdiff", "verify", chain.name)
    assert done.returncode == 5
    assert done.stderr.decode().startswith(f"blockdiff: {chain.name}-202611: generation 2: ")


def test_commands_that_need_one_chain_name_those_of_a_name(tmp_path: Path) -> None:
    chain = months(tmp_path)
    before = chain.files()
    said = (
        f"blockdiff: there is no chain {chain.name}, only those that `backup --chain` began: "
        f"{chain.name}-202610, {chain.name}-202611\n  name one of them\n"
    )
    for arguments in (
        ("restore", chain.name, tmp_path / "out"),
        ("restore", f"{chain.name}@1", tmp_path / "out"),
        ("repair", chain.name),
        ("verify", f"{chain.name}@1"),
        ("list", f"{chain.name}@1"),
    ):
        done = commands.run("blockdiff", *arguments)
        assert (done.returncode, done.stderr.decode()) == (1, said)
    assert chain.files() == before


def test_a_chain_beside_newer_ones_of_its_name_is_not_verified_in_their_place_without_a_word(tmp_path: Path) -> None:
    chain = months(tmp_path)
    for path in chain.directory.glob("disk-202610.*"):
        path.rename(chain.directory / path.name.replace("-202610", ""))
    done = commands.run("blockdiff", "verify", chain.name)
    said = f"blockdiff: warning: {chain.name}-202611 is newer than {chain.name}: use that name if you mean it\n"
    assert (done.returncode, done.stderr.decode()) == (3, said)
    done = commands.run("blockdiff", "list", chain.name)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2
    assert done.stderr.decode() == said.replace("warning", "note")
    done = commands.run("blockdiff", "restore", chain.name, tmp_path / "out")
    assert (done.returncode, done.stderr.decode()) == (3, said)


def test_a_first_run_that_is_at_work_is_not_a_chain_that_is_not_there(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    with LockedChain(chain.name):
        for arguments in (("list", chain.name), ("verify", chain.name), ("restore", chain.name, tmp_path / "out")):
            done = commands.run("blockdiff", *arguments)
            assert done.returncode == 4
            assert (
                f"the first run of {chain.name} is still running: no generation is complete yet" in done.stderr.decode()
            )
        done = commands.run("blockdiff", "list", chain.directory)
        assert re.split(" {2,}", done.stdout.decode().splitlines()[1])[-1] == "first run at work"
    done = commands.run("blockdiff", "list", chain.name)
    assert done.returncode == 1 and b"its first run failed or was cut off" in done.stderr


def test_a_first_run_of_a_period_that_is_at_work_is_one_of_its_name(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    with LockedChain(f"{chain.name}-202611"):
        for arguments, status in ((("list", chain.name), 4), (("status", chain.name), 1)):
            done = commands.run("blockdiff", *arguments)
            said = f"the first run of {chain.name}-202611 is still running"
            assert done.returncode == status and said in (done.stdout + done.stderr).decode()


def test_a_chain_that_only_looks_like_a_period_of_another_is_none(tmp_path: Path) -> None:
    chain = chains.some_days(tmp_path, 1)
    (tmp_path / "other").write_bytes(DAYS[1])
    for name in ("disk-123456", "disk-202611"):  # numbers of virtual machines, say
        SmallChain(chain.directory, tmp_path / "other", name).add()
    for path in chain.directory.glob("disk.*"):
        os.utime(path, (1000, 1000))
    commands.done("blockdiff", "verify", chain.name)
    (chain.directory / "disk.1.gz").unlink()
    assert commands.run("blockdiff", "status", chain.name).returncode == 2
    assert commands.run("blockdiff", "list", f"{chain.name}-1234").stderr.count(b"there is no chain") == 1


def test_a_directory_is_a_table_of_its_chains(tmp_path: Path) -> None:
    chain = months(tmp_path)
    for name in ("notes.txt", "backup.log", "backup.log.1", "backup.log.2.gz"):  # rotated logs are not chains
        (chain.directory / name).write_bytes(b"x")
    done = commands.run("blockdiff", "list", chain.directory)
    assert (done.returncode, done.stderr) == (0, b"")
    head, old, new = (re.split(" {2,}", line.strip()) for line in done.stdout.decode().splitlines())
    assert head == ["chain", "source", "gen", "last", "age", "image", "stored", "state"]
    assert (old[0], old[2], old[-1]) == ("disk-202610", "1", "ok")
    assert [new[0], new[1], new[2], new[7]] == ["disk-202611", str(chain.source), "2", "ok"]
    assert re.fullmatch("[0-9]+min", new[4])
    (chain.directory / "disk-202610.1.gz").unlink()
    done = commands.run("blockdiff", "list", f"{chain.directory}/", "--json")
    assert done.returncode == 5
    found = json.loads(done.stdout)
    assert [entry["name"] for entry in found] == [f"{chain.name}-202610", f"{chain.name}-202611"]
    assert found[0]["problem"] == f"generation 1: {chain.directory}/disk-202610.1.gz is missing"
    assert found[1]["image_size"] == len(DAYS[2]) and found[1]["age_s"] >= 0
    done = commands.run("blockdiff", "verify", chain.directory)
    assert done.returncode == 1 and f"`blockdiff list {chain.directory}` shows" in done.stderr.decode()


def test_a_version_file_that_cannot_be_read_hides_no_other_chain(tmp_path: Path) -> None:
    chain = months(tmp_path)
    (chain.directory / "other.ver").symlink_to("nowhere")
    done = commands.run("blockdiff", "list", chain.directory)
    assert done.returncode == 5
    assert [re.split(" {2,}", line)[0] for line in done.stdout.decode().splitlines()[1:]] == [
        *("disk-202610", "disk-202611", "other"),
    ]
    assert b"what it leads to cannot be reached" in done.stdout
    assert commands.run("blockdiff", "status", f"{chain.name}-202611").returncode == 0
    assert commands.run("blockdiff", "status", chain.directory / "other").returncode == 3


def test_a_period_that_the_clock_went_back_to_is_a_warning(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    SmallChain(chain.directory, chain.source, "disk-209901").add(DAYS[0])
    done = commands.run("blockdiff", "backup", "--chain", "monthly", chain.name, chain.source)
    assert done.returncode == 3
    assert f"warning: {chain.name}-209901 exists, and is of a later period than {chain.name}-20" in done.stderr.decode()
    assert commands.run("blockdiff", "backup", "--chain", "daily", chain.name, chain.source).returncode == 0


def test_a_run_that_cannot_look_at_the_periods_has_committed_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chains.new_chain(tmp_path)

    def fail(name: str, period: str) -> None:
        raise StorageError(f"cannot list the directory of {name}{period}")

    monkeypatch.setattr(periods, "later", fail)
    with pytest.raises(StorageError):
        chain.add(DAYS[0])
    assert chain.last() == 0
