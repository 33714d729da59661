"""What a restore says: where it cannot go, what it would do, and what it did."""

import json
from pathlib import Path

import pytest

from tests import chains, commands, mounts, terminal
from tests.chains import DAYS, SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


# Targets that are no place of this machine


def test_standard_output_is_refused_with_what_to_do(chain: SmallChain, tmp_path: Path) -> None:
    result = commands.run("blockdiff", "restore", chain.name, "-", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"not to standard output" in result.stderr
    assert f"blockdiff restore {chain.name} FILE && cat FILE" in result.stderr.decode()
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("place", ["web1:/dev/vg/lv", "root@web1:/srv/x", "[fe80::1]:/srv/x", "ssh://web1/srv/x"])
def test_another_machine_is_refused_with_what_to_do(chain: SmallChain, tmp_path: Path, place: str) -> None:
    result = commands.run("blockdiff", "restore", chain.name, place, cwd=tmp_path)
    assert result.returncode == 2
    assert f"{place} is on another machine, and a restore writes to this one" in result.stderr.decode()
    assert b"rsync -S FILE HOST:FILE" in result.stderr


def test_a_directory_of_this_machine_may_have_a_colon(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "day:").mkdir()
    commands.done("blockdiff", "restore", chain.name, "day:/out", cwd=tmp_path)
    assert (tmp_path / "day:" / "out").read_bytes() == DAYS[2]


# What would be done


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(chain: SmallChain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = commands.done("blockdiff", "restore", "--dry-run", f"{chain.name}@2", out).decode()
    assert shown.startswith(f"would restore generation 2 of {chain.name}, taken 20")
    assert f", to {out}: 394 bytes, from up to 2 deltas; nothing was written\n" in shown
    found = json.loads(commands.done("blockdiff", "restore", "--dry-run", "--json", chain.name, out))
    assert (found["dry_run"], found["generations"], found["image_size"]) == (True, [3, 2, 1], len(DAYS[2]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "source"]


def test_a_dry_run_fails_where_the_restore_would(chain: SmallChain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    result = commands.run("blockdiff", "restore", "--dry-run", chain.name, out)
    assert result.returncode == 1 and f"{out} exists" in result.stderr.decode()
    result = commands.run("blockdiff", "restore", "--dry-run", chain.name, tmp_path / "no" / "out")
    assert result.returncode == 1 and b"create the directory first" in result.stderr
    chain.file(".1.gz").write_bytes(b"cut")
    result = commands.run("blockdiff", "restore", "--dry-run", chain.name, tmp_path / "other")
    assert result.returncode == 5 and b"disk.1.gz has 3 bytes instead of" in result.stderr
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    result = commands.run("blockdiff", "restore", "--dry-run", chain.name, tmp_path / "other")
    assert result.returncode == 3 and b"generation 1 is missing: the restore fails if it needs" in result.stderr
    assert out.read_bytes() == b"precious"


def test_a_dry_run_says_that_there_is_little_room(chain: SmallChain, tmp_path: Path) -> None:
    chain.add(bytes(2 << 20))
    with mounts.tmpfs(tmp_path / "small", "size=1m") as small:
        result = commands.run("blockdiff", "restore", "--dry-run", chain.name, small / "out")
        assert result.returncode == 3
        said = f"the image has 2 MiB, but only 1 MiB are free for {small}/out: it fits only if enough of it is zeros"
        assert said in result.stderr.decode()
        commands.done("blockdiff", "restore", chain.name, small / "out")


def test_a_dry_run_does_not_go_with_salvage(chain: SmallChain, tmp_path: Path) -> None:
    result = commands.run("blockdiff", "restore", "--dry-run", "--salvage", chain.name, tmp_path / "out")
    assert result.returncode == 2 and b"omit --dry-run" in result.stderr


# What was done


def test_what_was_restored_is_said_if_asked_for(chain: SmallChain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = commands.done("blockdiff", "restore", "-v", f"{chain.name}@1", out).decode()
    assert shown.startswith(f"restored generation 1 of {chain.name}, taken 20")
    assert shown.endswith(f", to {out}: 384 bytes, every block was checked\n")
    status, screen = terminal.run("blockdiff", "restore", "--force", chain.name, out)
    assert status == 0
    assert f"restored generation 3 of {chain.name}, taken 20" in screen and "every block was checked" in screen


def test_without_manifests_the_time_is_not_known(chain: SmallChain, tmp_path: Path) -> None:
    chains.without_manifests(chain)
    shown = commands.done("blockdiff", "restore", "-v", chain.name, tmp_path / "out").decode()
    assert shown == f"restored generation 3 of {chain.name}, to {tmp_path}/out: 319 bytes, every block was checked\n"


def test_json_says_it_for_programs(chain: SmallChain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    listed = json.loads(commands.done("blockdiff", "list", "--json", chain.name))[2]
    found = json.loads(commands.done("blockdiff", "restore", "--json", chain.name, out))
    assert {key: found[key] for key in ("generation", "when", "source", "consistency", "image_size")} == {
        key: listed[key] for key in ("generation", "when", "source", "consistency", "image_size")
    }
    expected = {"name": chain.name, "target": str(out), "dry_run": False, "lost": [], "warnings": [], "notes": []}
    assert expected.items() <= found.items()
    with out.open("rb"):
        result = commands.run("blockdiff", "restore", "--json", "--force", chain.name, out)
    assert result.returncode == 3 and "is still in use" in json.loads(result.stdout)["warnings"][0]


def test_json_has_what_salvage_did_not_find(chain: SmallChain, tmp_path: Path) -> None:
    chain.file(".2.gz").unlink()
    result = commands.run("blockdiff", "restore", "--salvage", "--json", chain.name, tmp_path / "out")
    found = json.loads(result.stdout)
    assert result.returncode == 5 and found["lost"] == [[64, 64]]
    assert found["notes"] == [f"{chain.file('.2.gz')} is missing"]
