"""What monitoring is told of chains, and that it notices what is wrong."""

import os
import re
from pathlib import Path

import pytest

from blockdiff import backup, listing, status
from blockdiff.address import Address
from blockdiff.backup import Options
from blockdiff.chain import Chain
from blockdiff.status import State
from tests import chains, commands, faults
from tests.chains import BLOCK, DAYS, SmallChain

HOUR_S = 3600.0


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def finished(chain: SmallChain) -> float:
    with Chain(chain.name) as opened:
        found = status._seconds(listing.entries(opened)[-1].when)
    assert found is not None
    return found


def look(chain: SmallChain, age_s: float = HOUR_S, max_age_s: float = 26 * HOUR_S) -> status.Status:
    return status.look(chain.name, max_age_s, finished(chain) + age_s)


def told(*arguments: str | Path, state: State) -> str:
    done = commands.run("blockdiff", "status", *arguments)
    assert (done.returncode, done.stderr) == (state, b"")
    return done.stdout.decode()


def test_a_chain_that_is_young_enough_is_ok(chain: SmallChain) -> None:
    found = look(chain, 26 * HOUR_S)
    assert (found.state, found.text) == (State.OK, "generation 3 is 1d 2h old")
    assert (found.generation, found.age_s, found.image_bytes) == (3, 26 * HOUR_S, len(DAYS[2]))
    with Chain(chain.name) as opened:
        assert found.stored_bytes == sum(each.stored_bytes() for each in opened.generations.values())


def test_a_chain_that_is_too_old_is_critical(chain: SmallChain) -> None:
    found = look(chain, 26 * HOUR_S + 1)
    assert (found.state, found.text) == (State.CRITICAL, "generation 3 is 1d 2h old, more than 1d 2h")


def test_a_generation_from_the_future_is_a_warning(chain: SmallChain) -> None:
    assert look(chain, -299).state == State.OK
    found = look(chain, -301)
    assert (found.state, found.text) == (State.WARNING, "generation 3 is from the future: is the clock right?")


@pytest.mark.parametrize("suffix", [".1.gz", ".2.sha256", ".2.json"])
def test_a_missing_file_is_critical(chain: SmallChain, suffix: str) -> None:
    when = finished(chain)
    chain.file(suffix).unlink()
    found = status.look(chain.name, HOUR_S, when)
    assert found.state == State.CRITICAL
    assert found.text == f"generation {suffix[1]} damaged: {chain.file(suffix)} is missing"


def test_a_last_generation_without_its_manifest_is_a_warning(chain: SmallChain) -> None:
    chain.file(".3.json").unlink()
    found = status.look(chain.name, HOUR_S, chain.file(".3.gz").stat().st_mtime)
    assert (found.state, found.text) == (
        State.WARNING,
        "generation 3 is 0min old, and has no manifest, unlike others before it",
    )


def test_damage_in_many_generations_is_told_in_short(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    for day in range(8):
        chain.add(DAYS[day % 3])
    when = finished(chain)
    for path in chain.directory.glob("disk.*.gz"):
        path.write_bytes(b"short")
    assert status.look(chain.name, HOUR_S, when).text.startswith("generation 1, 2, 3, 4, 5, … damaged: ")


def test_a_chain_without_version_file_and_manifests_is_critical(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    chains.without_manifests(chain)
    assert status.look(chain.name, HOUR_S, os.stat(chain.file(".3.gz")).st_mtime).state == State.OK
    chain.file(".ver").unlink()
    found = status.look(chain.name, HOUR_S, 0)
    assert found.state == State.CRITICAL and "says which" not in found.text
    assert found.text.startswith(f"{chain.file('.ver')} is missing")


def test_a_run_that_was_cut_off_is_a_warning(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    when = finished(chain)
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[0])
    found = status.look(chain.name, HOUR_S, when + 60)
    assert (found.state, found.text) == (State.WARNING, "generation 3 is 1min old, and a run after it was cut off")


def test_no_chain_is_critical_and_no_directory_unknown(tmp_path: Path) -> None:
    assert status.look(f"{tmp_path}/none", HOUR_S, 0).state == State.CRITICAL
    found = status.look(f"{tmp_path}/none/none", HOUR_S, 0)
    assert found.state == State.UNKNOWN and found.text.startswith("cannot open the backup directory")


def test_the_newest_of_the_chains_of_a_period_counts(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(DAYS[0])
    for period in ("-202610", "-202611"):
        backup.backup(chain.name + period, Address(None, str(chain.source)), Options(block_size=BLOCK))
    (chain.directory / "disk-other.ver").write_bytes(b"7\n")
    found = status.look(chain.name, HOUR_S, 0)
    assert re.fullmatch(r".*/disk-20261[01]", found.name) and found.generation == 1
    os.rename(chain.directory / "disk-202611.ver", chain.directory / "gone")
    assert status.look(chain.name, HOUR_S, 0).name == f"{chain.name}-202610"


def test_the_worst_state_is_that_of_all() -> None:
    def of(*states: State) -> State:
        return status.worst(status.Status("x", state, "") for state in states)

    assert of(State.OK, State.WARNING) == State.WARNING
    assert of(State.OK, State.UNKNOWN, State.WARNING) == State.UNKNOWN
    assert of(State.UNKNOWN, State.CRITICAL, State.WARNING) == State.CRITICAL


def test_ages_are_told_in_two_units() -> None:
    assert [status.age(s) for s in (-5, 59, 60, 3599, 3600, 86399, 86400, 26 * HOUR_S, 9e6)] == [
        *("0min", "0min", "1min", "59min", "1h 0min", "23h 59min", "1d 0h", "1d 2h", "104d 4h"),
    ]


def test_one_line_for_nagios(chain: SmallChain, tmp_path: Path) -> None:
    line = told(chain.name, state=State.OK)
    assert re.fullmatch(
        rf"BLOCKDIFF OK - {chain.name}: generation 3 is 0min old \| '{chain.name}'=[0-9]+s;;93600\n", line
    )
    line = told(chain.name, f"{tmp_path}/no|ne", state=State.CRITICAL)
    assert line.startswith(f"BLOCKDIFF CRITICAL - {tmp_path}/no/ne: there is no chain of this name | '{chain.name}'=")
    assert line.count("\n") == 1 and line.count("|") == 1
    assert told("--max-age", "1w", chain.name, state=State.OK).endswith(";;604800\n")


def test_a_test_for_each_chain(chain: SmallChain, tmp_path: Path) -> None:
    lines = told("--tap", chain.name, f"{tmp_path}/no#ne", state=State.CRITICAL).splitlines()
    assert lines == [
        "TAP version 13",
        "1..2",
        f"ok 1 - {chain.name}: generation 3 is 0min old",
        f"not ok 2 - {tmp_path}/no\\#ne: there is no chain of this name",
    ]


def test_metrics_for_prometheus(chain: SmallChain, tmp_path: Path) -> None:
    path = tmp_path / "blockdiff.prom"
    told("--prometheus", path, chain.name, f'{tmp_path}/no"ne', state=State.CRITICAL)
    lines = path.read_text().splitlines()
    label = f'{{chain="{chain.name}"}}'
    assert f"blockdiff_state{label} 0" in lines
    assert f'blockdiff_state{{chain="{tmp_path}/no\\"ne"}} 2' in lines
    assert f"blockdiff_last_generation{label} 3" in lines
    assert f"blockdiff_last_finished_timestamp_seconds{label} {finished(chain):.0f}" in lines
    assert f"blockdiff_image_bytes{label} {len(DAYS[2])}" in lines
    assert sum(line.startswith("# TYPE") for line in lines) == 5
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.glob("*.tmp")) == []


def test_metrics_that_cannot_be_written_are_an_error(chain: SmallChain, tmp_path: Path) -> None:
    done = commands.run("blockdiff", "status", "--prometheus", tmp_path / "none" / "x", chain.name)
    assert done.returncode == State.UNKNOWN
    assert done.stderr == f"blockdiff: cannot write {tmp_path}/none/x: No such file or directory\n".encode()


@pytest.mark.parametrize("age", ["26", "1y", "-1h", ""])
def test_what_is_no_age_is_refused(chain: SmallChain, age: str) -> None:
    done = commands.run("blockdiff", "status", f"--max-age={age}", chain.name)
    assert done.returncode == 2 and b"is no age; use one like 26h or 8d" in done.stderr


@pytest.mark.parametrize("has_manifests", [True, False])
def test_first_generations_that_are_gone_are_critical(tmp_path: Path, has_manifests: bool) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    if not has_manifests:
        chains.without_manifests(chain)
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    line = told(chain.name, state=State.CRITICAL)
    assert f"{chain.name}: generation 1 missing: none of its files is there" in line
