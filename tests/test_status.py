"""What monitoring is told of chains, and that it notices what is wrong."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.backup import Options
from blockdiff.chain import clock, listing, monitoring
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.durable import Directory
from blockdiff.chain.generations import Chain
from blockdiff.chain.monitoring import State
from blockdiff.cli import status as status_command
from blockdiff.format import manifest
from blockdiff.transport.address import Address
from tests import chains, commands, faults
from tests.chains import BLOCK, DAYS, SmallChain

HOUR_S = 3600.0


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def finished(chain: SmallChain) -> float:
    with Chain(chain.name) as opened:
        found = clock.seconds(listing.entries(opened)[-1].when)
    assert found is not None
    return found


def look(chain: SmallChain, age_s: float = HOUR_S, max_age_s: float = 26 * HOUR_S) -> monitoring.Status:
    return monitoring.look(chain.name, max_age_s, finished(chain) + age_s)


def told(*arguments: str | Path, state: State) -> str:
    done = commands.run("blockdiff", "status", *arguments)
    assert (done.returncode, done.stderr) == (state, b"")
    return young(done.stdout.decode())


def young(text: str) -> str:
    """Return a text in which what is some minutes old is as young as it can be: a machine may stand still meanwhile."""
    return re.sub(r"\b[0-9]+min old", "0min old", text)


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
    found = monitoring.look(chain.name, HOUR_S, when)
    assert found.state == State.CRITICAL
    assert found.text == f"generation {suffix[1]} damaged: {chain.file(suffix)} is missing"


def test_a_last_generation_without_its_manifest_is_a_warning(chain: SmallChain) -> None:
    chain.file(".3.json").unlink()
    found = monitoring.look(chain.name, HOUR_S, chain.file(".3.gz").stat().st_mtime)
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
    assert monitoring.look(chain.name, HOUR_S, when).text.startswith("generation 1, 2, 3, 4, 5, … damaged: ")


def test_a_chain_without_version_file_and_manifests_is_critical(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    chains.without_manifests(chain)
    assert monitoring.look(chain.name, HOUR_S, os.stat(chain.file(".3.gz")).st_mtime).state == State.OK
    chain.file(".ver").unlink()
    found = monitoring.look(chain.name, HOUR_S, 0)
    assert found.state == State.CRITICAL and "says which" not in found.text
    assert found.text.startswith(f"{chain.file('.ver')} is missing")


def test_a_run_that_was_cut_off_is_a_warning(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    when = finished(chain)
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[0])
    found = monitoring.look(chain.name, HOUR_S, when + 60)
    assert (found.state, found.text) == (State.WARNING, "generation 3 is 1min old, and a run after it was cut off")


def test_no_chain_is_critical_and_no_directory_unknown(tmp_path: Path) -> None:
    assert monitoring.look(f"{tmp_path}/none", HOUR_S, 0).state == State.CRITICAL
    found = monitoring.look(f"{tmp_path}/none/none", HOUR_S, 0)
    assert found.state == State.UNKNOWN and found.text.startswith("cannot open the backup directory")


def test_the_newest_of_the_chains_of_a_period_counts(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(DAYS[0])
    for period in ("-202610", "-202611"):
        backup.backup(chain.name + period, Address(None, str(chain.source)), Options(block_size=BLOCK))
    (chain.directory / "disk-other.ver").write_bytes(b"7\n")
    found = monitoring.look(chain.name, HOUR_S, 0)
    assert found.name == chain.name and found.generation == 1
    assert found.chain is not None and re.fullmatch(r".*/disk-20261[01]", found.chain)
    for path in chain.directory.glob("disk-202611.*"):
        path.unlink()
    assert monitoring.look(chain.name, HOUR_S, 0).chain == f"{chain.name}-202610"


def test_the_worst_state_is_that_of_all() -> None:
    def of(*states: State) -> State:
        return monitoring.worst(monitoring.Status("x", state, "") for state in states)

    assert of(State.OK, State.WARNING) == State.WARNING
    assert of(State.OK, State.UNKNOWN, State.WARNING) == State.UNKNOWN
    assert of(State.UNKNOWN, State.CRITICAL, State.WARNING) == State.CRITICAL


def test_ages_are_told_in_two_units() -> None:
    assert [clock.shown_age(s) for s in (-5, 59, 60, 3599, 3600, 86399, 86400, 26 * HOUR_S, 9e6)] == [
        *("0min", "0min", "1min", "59min", "1h 0min", "23h 59min", "1d 0h", "1d 2h", "104d 4h"),
    ]


def test_one_line_for_nagios(chain: SmallChain, tmp_path: Path) -> None:
    line = told(chain.name, state=State.OK)
    assert re.fullmatch(
        rf"BLOCKDIFF OK - {chain.name}: generation 3 is 0min old \| '{chain.name}'=[0-9]+s;;93600\n", line
    )
    line = told(chain.name, f"{tmp_path}/no|ne", state=State.CRITICAL)
    assert line.startswith(
        f"BLOCKDIFF CRITICAL - {tmp_path}/no/ne: there is no chain {tmp_path}/no/ne | '{chain.name}'="
    )
    assert line.count("\n") == 1 and line.count("|") == 1
    assert told("--max-age", "1w", chain.name, state=State.OK).endswith(";;604800\n")


def test_a_test_for_each_chain(chain: SmallChain, tmp_path: Path) -> None:
    lines = told("--tap", chain.name, f"{tmp_path}/no#ne", state=State.CRITICAL).splitlines()
    assert lines == [
        "TAP version 13",
        "1..2",
        f"ok 1 - {chain.name}: generation 3 is 0min old",
        f"not ok 2 - {tmp_path}/no\\#ne: there is no chain {tmp_path}/no\\#ne",
    ]


def test_metrics_for_prometheus(chain: SmallChain, tmp_path: Path) -> None:
    path = tmp_path / "blockdiff.prom"
    told("--prometheus", path, chain.name, f'{tmp_path}/no"ne', state=State.CRITICAL)
    lines = path.read_text().splitlines()
    label = f'{{name="{chain.name}",chain="{chain.name}"}}'
    assert f"blockdiff_state{label} 0" in lines
    assert f'blockdiff_state{{name="{tmp_path}/no\\"ne"}} 2' in lines
    assert f"blockdiff_last_generation{label} 3" in lines
    assert f"blockdiff_last_finished_timestamp_seconds{label} {finished(chain):.0f}" in lines
    assert f"blockdiff_last_success_timestamp_seconds{label} {finished(chain):.0f}" in lines
    assert f"blockdiff_image_bytes{label} {len(DAYS[2])}" in lines
    assert sum(line.startswith("# TYPE") for line in lines) == 6
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.glob("*.tmp")) == []


def test_metrics_that_cannot_be_written_are_unknown_unless_worse_is_known(chain: SmallChain, tmp_path: Path) -> None:
    path = tmp_path / "none" / "x"
    done = commands.run("blockdiff", "status", "--prometheus", path, chain.name)
    said = f"cannot write the metrics to {path}: No such file or directory"
    assert done.returncode == State.UNKNOWN
    assert done.stderr.decode() == f"blockdiff: {said}\n  create the directory first\n"
    assert done.stdout.decode().startswith(f"BLOCKDIFF UNKNOWN - {path}: {said} | '{chain.name}'=")
    done = commands.run("blockdiff", "status", "--prometheus", path, chain.name, f"{tmp_path}/other")
    assert done.returncode == State.CRITICAL


def test_metrics_are_readable_whatever_the_umask_is(chain: SmallChain, tmp_path: Path) -> None:
    path = tmp_path / "blockdiff.prom"
    before = os.umask(0o077)
    try:
        told("--prometheus", path, chain.name, state=State.OK)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


def test_metrics_replace_nothing_but_a_file(chain: SmallChain, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / "link").symlink_to(precious)
    os.mkfifo(tmp_path / "fifo")
    for name, what in (("link", "a symbolic link"), ("fifo", "not a regular file")):
        done = commands.run("blockdiff", "status", "--prometheus", tmp_path / name, chain.name)
        assert done.returncode == State.UNKNOWN
        assert f"cannot write the metrics to {tmp_path}/{name}: it is {what}" in done.stderr.decode()
    assert precious.read_text() == "precious" and (tmp_path / "link").is_symlink()


def test_the_temporary_name_of_metrics_cannot_be_foreseen(
    chain: SmallChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[tuple[str, int]] = []
    real = os.open

    def noted(path: str, flags: int, mode: int = 0o777) -> int:
        opened.append((path, flags))
        return real(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", noted)
        for _ in range(2):
            status_command._write(str(tmp_path / "x.prom"), "text\n")
    (first, flags), (second, _) = opened
    assert first != second and str(os.getpid()) not in first.removeprefix(str(tmp_path))
    assert flags & os.O_EXCL and flags & os.O_NOFOLLOW


@pytest.mark.parametrize("age", ["26", "1y", "-1h", ""])
def test_what_is_no_age_is_refused(chain: SmallChain, age: str) -> None:
    done = commands.run("blockdiff", "status", f"--max-age={age}", chain.name)
    assert done.returncode == State.UNKNOWN and b"is not an age; use one like 26h or 8d" in done.stderr


@pytest.mark.parametrize("has_manifests", [True, False])
def test_first_generations_that_are_gone_are_critical(tmp_path: Path, has_manifests: bool) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    if not has_manifests:
        chains.without_manifests(chain)
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    line = told(chain.name, state=State.CRITICAL)
    assert f"{chain.name}: generation 1 missing: none of its files is there" in line


def test_of_name_and_its_periods_the_newest_counts_and_the_label_is_that_of_name(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)  # begun without --chain
    for period in ("-202610", "-202611"):
        backup.backup(chain.name + period, Address(None, str(chain.source)), Options(block_size=BLOCK))
    for path in chain.directory.glob("disk.*.json"):  # an old one: its time is that of its files
        path.unlink()
    for path in chain.directory.glob("disk.*"):
        os.utime(path, (1000, 1000))
    for path in chain.directory.glob("disk-202610.*"):
        path.unlink()
    out = told("--prometheus", tmp_path / "prom", chain.name, chain.name, state=State.OK)
    assert out.startswith(f"BLOCKDIFF OK - {chain.name}-202611: generation 1 is 0min old | '{chain.name}'=")
    assert out.count(";;") == 1
    lines = (tmp_path / "prom").read_text().splitlines()
    label = f'{{name="{chain.name}",chain="{chain.name}-202611"}}'
    assert [line for line in lines if line.startswith("blockdiff_state")] == [f"blockdiff_state{label} 0"]


def test_a_period_that_has_lost_its_version_file_is_not_passed_over(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    old = chains.SmallChain(chain.directory, chain.source, "disk-202610")
    new = chains.SmallChain(chain.directory, chain.source, "disk-202611")
    old.add(DAYS[0])
    new.add(DAYS[0], Options(block_size=BLOCK, delta_format=1, digest="md5"))
    for path in chain.directory.glob("disk-202611.*"):
        if path.suffix in (".json", ".ver"):
            path.unlink()
        else:
            os.utime(path, (finished(old) + 60, finished(old) + 60))
    found = monitoring.look(chain.name, HOUR_S, finished(old) + 60)
    assert (found.state, found.chain) == (State.CRITICAL, new.name)


def test_names_of_any_bytes_fit_each_format(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path, os.fsdecode(b"a\xff\"'#\n|=\\b"))
    chain.add(DAYS[0])
    shown = f'{chain.directory}/a\\udcff"#\\n/-\\b'
    done = commands.run("blockdiff", "status", "--prometheus", tmp_path / "prom", chain.name)
    assert done.returncode == State.OK and done.stdout.decode().count("\n") == 1
    assert young(done.stdout.decode()).startswith(f"BLOCKDIFF OK - {shown}: generation 1 is 0min old | '{shown}'=")
    label = f"{chain.directory}/a\\\\xff\\\"'#\\n|=\\\\b"
    assert f'blockdiff_last_generation{{name="{label}",chain="{label}"}} 1' in (tmp_path / "prom").read_text("utf-8")
    done = commands.run("blockdiff", "status", "--tap", chain.name)
    tap = f"{chain.directory}/a\\\\udcff\"'\\#\\\\n|=\\\\b"
    assert young(done.stdout.decode()).splitlines()[2] == f"ok 1 - {tap}: generation 1 is 0min old"


@pytest.mark.parametrize(
    ("consistency", "words"),
    [("live", "the source was in use while it was read"), ("changing", "it was written to while it was read")],
)
def test_a_newest_generation_of_several_moments_is_a_warning(tmp_path: Path, consistency: str, words: str) -> None:
    chain = chains.some_days(tmp_path, 2)
    with Chain(chain.name) as opened:
        known = opened.generations[2].manifest
        assert known is not None
        chain.file(".2.json").write_bytes(replace(known, consistency=consistency).to_bytes())
    line = told(chain.name, state=State.WARNING)
    assert f"generation 2 is 0min old, and may mix several moments ({consistency}): {words}" in line
    chain.add(DAYS[2])
    assert look(chain).state == State.OK


def test_a_clock_that_went_back_is_a_warning(tmp_path: Path) -> None:
    chain = chains.some_days(tmp_path, 1)
    with Chain(chain.name) as opened:
        known = opened.generations[1].manifest
        assert known is not None
    later = clock.iso((clock.seconds(known.finished) or 0) + 86400)
    chain.file(".1.json").write_bytes(replace(known, started=later).to_bytes())
    found = look(chain)
    assert found.state == State.WARNING
    assert f"it was finished at {known.finished}, but it was started after that, at {later}" in found.text
    chain.file(".1.json").write_bytes(replace(known, finished=later).to_bytes())
    done = commands.run("blockdiff", "backup", chain.name, chain.source)
    assert done.returncode == 3
    said = f"the generation before it was finished after that, at {later}: the clock is or was wrong"
    assert "blockdiff: warning: generation 2: it was finished at " in done.stderr.decode()
    assert said in done.stderr.decode() and said in told(chain.name, state=State.WARNING)


def test_a_chain_of_the_future_is_not_the_newest_for_ever(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    future = chains.SmallChain(chain.directory, chain.source, "disk-209901")
    present = chains.SmallChain(chain.directory, chain.source, "disk-202611")
    for each in (future, present):
        each.add(DAYS[0])
    with Chain(future.name) as opened:
        known = opened.generations[1].manifest
        assert known is not None
    future.file(".1.json").write_bytes(replace(known, finished="2099-01-01T00:00:00+00:00").to_bytes())
    assert monitoring.look(chain.name, HOUR_S, finished(present)).chain == present.name
    assert monitoring.look(chain.name, HOUR_S, 0.0).chain == future.name


def test_a_first_run_that_is_at_work_is_a_warning(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    with LockedChain(chain.name):
        line = told(chain.name, state=State.WARNING)
        assert f"the first run of {chain.name} is still running: no generation is complete yet" in line
    line = told(chain.name, state=State.CRITICAL)
    assert f"no generation of {chain.name} is complete: its first run failed or was cut off" in line


def test_a_directory_is_listed_once_for_all_its_chains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chains.some_days(tmp_path, 2)
    names = []
    for number in range(30):
        for path in chain.directory.glob("disk.*"):
            os.link(path, chain.directory / f"n{number}-202611{path.name.removeprefix('disk')}")
            os.link(path, chain.directory / f"n{number}-202610{path.name.removeprefix('disk')}")
        names.append(f"{chain.directory}/n{number}")
    when = finished(chain)
    listings: list[str] = []
    parsed: list[str] = []
    real_names, real_parse = Directory.names, manifest.from_bytes

    def noted_names(self: Directory) -> list[str]:
        listings.append(self.path)
        return real_names(self)

    def noted_parse(content: bytes, path: str) -> manifest.Manifest:
        parsed.append(path)
        return real_parse(content, path)

    monkeypatch.setattr(Directory, "names", noted_names)
    monkeypatch.setattr(manifest, "from_bytes", noted_parse)
    found = monitoring.look_at_all(names, HOUR_S, when)
    assert {each.state for each in found} == {State.OK}
    assert len(listings) <= 3
    assert len(parsed) <= 30 * (2 + 2)  # the last of each chain, all of the newest
    parsed.clear()
    chain.add(DAYS[2])
    old = [path for path in parsed if path.startswith(str(chain.directory))]
    assert sorted(old) == [f"{chain.name}.{n}.json" for n in (1, 2)]
