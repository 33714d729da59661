"""`blockdiff backup` for logs and for the careful: what a chain keeps, --verbose, --dry-run, --json and the help."""

import json
import time
from importlib import import_module
from pathlib import Path

import click
import pytest

from blockdiff.host import lvs
from tests import chains, commands
from tests.chains import DAYS, SmallChain
from tests.fake_lvm import FakeLvm
from tests.sshd import Sshd


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    chain = chains.new_chain(tmp_path)
    chain.source.write_bytes(DAYS[0])
    return chain


def refused(status: int, *arguments: str | Path) -> str:
    result = commands.run("blockdiff", "backup", *arguments)
    assert (result.returncode, result.stdout) == (status, b""), result
    return result.stderr.decode()


def changed(chain: SmallChain) -> dict[str, int]:
    """Return when each file was changed."""
    return {path.name: path.stat().st_ctime_ns for path in chain.directory.iterdir()}


# What an existing chain keeps


def test_what_a_chain_keeps_is_told_where_cron_runs_it(chain: SmallChain) -> None:
    """On standard error, and every time: the line contradicts the chain. The generation itself is as it should be."""
    commands.done(
        "blockdiff", "backup", "--block-size", "64", "--digest", "md5", "--format", "1", chain.name, chain.source
    )
    options = ["--block-size", "128", "--digest", "sha256", "--format", "2"]
    for _ in range(2):
        result = commands.run("blockdiff", "backup", *options, chain.name, chain.source)
        assert (result.returncode, result.stdout) == (0, b"")
        assert result.stderr.decode().splitlines() == [
            "blockdiff: note: the chain keeps its block size 64 (asked for: 128; --full would change it)",
            "blockdiff: note: the chain keeps its digest md5 (asked for: sha256; --full would change it)",
            "blockdiff: note: the chain keeps its format 1 (asked for: 2; --full would change it)",
        ]
    commands.done("blockdiff", "backup", "--full", *options, chain.name, chain.source)
    commands.done("blockdiff", "backup", *options, chain.name, chain.source)  # now that is what the chain has
    chain.images = dict.fromkeys(range(1, 6), DAYS[0])
    chain.assert_sound()


def test_options_that_a_chain_has_already_are_no_news(chain: SmallChain) -> None:
    options = ["--block-size", "64", "--digest", "sha256", "--format", "2", "--compression", "zstd"]
    for _ in range(2):
        assert commands.done("blockdiff", "backup", *options, chain.name, chain.source) == b""


def test_compression_is_of_each_generation(chain: SmallChain) -> None:
    """So nothing is kept of it, and nothing is to be said."""
    for compression, suffix in (("gzip", ".1.gz"), ("zstd", ".2.zst"), ("none", ".3")):
        assert commands.done("blockdiff", "backup", "--compression", compression, chain.name, chain.source) == b""
        assert chain.file(suffix).exists()
    assert chain.bad() == []


def test_options_that_mean_nothing_for_a_source_on_this_machine_are_told(chain: SmallChain) -> None:
    for options in (["--transport", "ssh"], ["--ssh-option", "Port=22"]):
        result = commands.run("blockdiff", "backup", *options, chain.name, chain.source)
        assert (result.returncode, result.stdout) == (0, b"")
        told = f"blockdiff: note: {chain.source} is on this machine: --transport and --ssh-option change nothing\n"
        assert result.stderr.decode() == told


# --verbose


def test_verbose_prints_a_line_for_a_log(chain: SmallChain) -> None:
    words = ("blockdiff", "backup", "--block-size", "64", "-v", chain.name, chain.source)
    first = commands.done(*words).decode()
    assert first.startswith(f"{chain.name}: generation 1: full, ") and first.endswith(" stored, still\n")
    chain.source.write_bytes(DAYS[1])
    second = commands.done(*words).decode()
    assert second.startswith(f"{chain.name}: generation 2: 3 of 7 blocks changed, ") and second.count("\n") == 1


def test_verbose_with_json_prints_json_alone(chain: SmallChain) -> None:
    assert json.loads(commands.done("blockdiff", "backup", "-v", "--json", chain.name, chain.source))["generation"] == 1


# --dry-run


def test_a_dry_run_says_what_would_be_done_and_does_nothing(chain: SmallChain) -> None:
    words = ("blockdiff", "backup", "--dry-run", chain.name, chain.source)
    assert commands.done(*words).decode() == (
        f"would be done: generation 1 of {chain.name}, full, of {chain.source}: sha256, blocks of 64 KiB, format 2\n"
    )
    assert list(chain.directory.iterdir()) == []
    chain.add(DAYS[0])
    before = changed(chain)
    result = commands.run(*words, "--digest", "md5")
    kept = "blockdiff: note: the chain keeps its digest sha256 (asked for: md5; --full would change it)\n"
    assert (result.returncode, result.stderr.decode()) == (0, kept)
    assert result.stdout.decode() == (
        f"would be done: generation 2 of {chain.name}, incremental on generation 1, of {chain.source}: "
        "sha256, blocks of 64 bytes, format 2\n"
    )
    assert changed(chain) == before


def test_a_dry_run_prints_json_in_the_words_of_a_manifest(chain: SmallChain) -> None:
    words = ("blockdiff", "backup", "--json", "--chain", "daily", chain.name, chain.source)
    noon = {"TZ": f"<noon>{time.gmtime().tm_hour - 12}"}  # no midnight comes in between
    planned = json.loads(commands.done(*words, "--dry-run", env=noon))
    made = json.loads(commands.done(*words, env=noon))
    told = {name: made[name] for name in planned if name != "source"}
    assert {name: value for name, value in planned.items() if name != "source"} == told
    assert planned["source"] == {"host": None, "path": str(chain.source)}


def test_a_dry_run_finds_what_the_run_would_fail_of(chain: SmallChain, tmp_path: Path) -> None:
    chain.add(DAYS[0])
    before = chain.files()
    other = tmp_path / "other"
    other.write_bytes(DAYS[1])
    assert "holds backups of" in refused(1, "--dry-run", chain.name, other)
    assert "No such file" in refused(1, "--dry-run", f"{chain.name}2", tmp_path / "none")
    assert "cannot end like" in refused(2, "--dry-run", f"{chain.name}@2", chain.source)
    assert "gzip has no level 77" in refused(2, "--dry-run", "--level", "77", chain.name, chain.source)
    chain.directory.chmod(0o777)
    assert "other users can write to" in refused(1, "--dry-run", chain.name, chain.source)
    chain.directory.chmod(0o700)
    chain.file(".1.sha256").write_bytes(b"damaged")
    assert "disk.1.sha256" in refused(5, "--dry-run", chain.name, chain.source)
    assert {name for name in chain.files() if name != "disk.1.sha256"} == before.keys() - {"disk.1.sha256"}


def test_a_dry_run_goes_over_ssh(sshd: Sshd, chain: SmallChain) -> None:
    words = (*sshd.arguments, "--dry-run", chain.name, sshd.url(chain.source))
    for transport in ("ssh", "paramiko"):
        told = commands.done("blockdiff", "backup", "--transport", transport, *words).decode()
        assert f"of 127.0.0.1:{sshd.port}:{chain.source}: " in told
    assert list(chain.directory.iterdir()) == []


def test_a_dry_run_makes_and_removes_no_snapshot(
    chain: SmallChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even what a killed run left, nor does it run the commands around the moment."""
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("vg", 200 << 20)
    monkeypatch.setattr(commands, "PATH", f"{fake.commands}:{commands.PATH}")
    chain.source = fake.add_file("vg", "lv", DAYS[0])
    marker = tmp_path / "marker"
    words = ("--lvm", "--before", f"touch {marker}", chain.name, chain.source)
    commands.done("blockdiff", "backup", "--dry-run", *words)
    with fake.state() as state:
        state["groups"]["vg"] = 0
    assert "less with --snapshot-size" in refused(1, "--dry-run", *words) and not marker.exists()
    with fake.state() as state:
        state["groups"]["vg"] = 200 << 20
    more = ("--also", f"{chain.name}2={fake.add_file('vg', 'log', DAYS[1])}")
    told = commands.done("blockdiff", "backup", "--dry-run", *more, *words).decode().splitlines()
    assert [line.partition(",")[0] for line in told] == [
        f"would be done: generation 1 of {chain.name}",
        f"would be done: generation 1 of {chain.name}2",
    ]
    planned = json.loads(commands.done("blockdiff", "backup", "--dry-run", "--json", *more, *words))
    assert [plan["name"] for plan in planned] == [chain.name, f"{chain.name}2"]
    left = "bd_0123456789ab"
    tags = f"{lvs.TAG},{lvs.TAG}_pid_1_1_0123"
    fake.add("vg", left, origin="lv", lv_attr="swi-a-s---", segtype="linear", lv_tags=tags)
    commands.done("blockdiff", "backup", "--dry-run", *words)
    assert fake.names() == ["lv", "log", left]
    assert {name for name, *_ in fake.calls()} == {"lvs"} and list(chain.directory.iterdir()) == []
    commands.done("blockdiff", "backup", *words)  # the real one does all that
    assert left not in fake.names() and marker.exists()


# Help


def test_the_help_has_examples_and_the_forms_of_a_size(chain: SmallChain) -> None:
    shown = commands.done("blockdiff", "backup", "--help", env={"COLUMNS": "80"}).decode()
    assert "blockdiff backup /var/backup/web1 root@web1:/srv/web1.img\n" in shown
    assert "64K, 64KB, 64KiB " in shown and "20%" in shown
    for size in ("65536", "64K", "64k", "64KB", "64KiB"):
        told = commands.done("blockdiff", "backup", "--dry-run", "--block-size", size, chain.name, chain.source)
        assert b"blocks of 64 KiB" in told


@pytest.mark.parametrize("size", ["0", "0%", "x", "5X", "-1", "1.5G", "20 %", ""])
def test_a_size_of_a_snapshot_that_is_none_is_told_at_once(chain: SmallChain, size: str) -> None:
    assert "--snapshot-size" in refused(2, "--lvm", "--snapshot-size", size, chain.name, chain.source)


@pytest.mark.parametrize("name", ["authorize", "backup", "repair", "restore", "snapshots", "status", "verify"])
def test_the_help_of_a_command_has_an_example_that_is_one(name: str) -> None:
    """Each line is a command line that the command takes; it is not run."""
    shown = commands.done("blockdiff", name, "--help", env={"COLUMNS": "80"}).decode()
    examples = [line.split() for line in shown.splitlines() if line.startswith(f"    blockdiff {name} ")]
    assert examples
    command: click.Command = import_module(f"blockdiff.cli.{name}").command
    for words in examples:
        assert command.make_context(name, words[2:]).params


def test_no_summary_of_a_command_is_cut_off() -> None:
    shown = commands.done("blockdiff", "--help", env={"COLUMNS": "80"}).decode()
    summaries = shown.partition("Commands:\n")[2].splitlines()
    assert len(summaries) == 8 and not any("..." in line for line in summaries)
    assert all(line.startswith("  ") and line[2] != " " for line in summaries)  # each on a line of its own
