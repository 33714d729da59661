"""Runs on thin volumes that are stopped on their way: what stays reserved or kept, and what later runs do with it."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import commands
from tests.lab.scene import PATIENCE_S, Victim, agents, kill_agent
from tests.lab.volumes import VolumeGroup
from tests.mariadb import wait_for

_PLACE = "/run/blockdiff-thin"
_HOLD, _BEGUN = f"{_PLACE}/hold", f"{_PLACE}/begun"
#: Comes before LVM's own on the agent's PATH.
_WRAPPER = "/usr/local/bin/thin_delta"
_WAIT = f'#!/bin/sh\ntouch {_BEGUN}\nwhile [ -e {_HOLD} ]; do sleep 0.05; done\nexec /usr/sbin/thin_delta "$@"\n'


class Thin:
    """Two thin volumes, a chain for each, and a generation in each whose snapshot was kept."""

    def __init__(self, group: VolumeGroup, directory: Path) -> None:
        self.group = group
        self.guest = group.guest
        self._name = str(directory / "one")
        group.pool("pool", "128M")
        self.paths = [group.thin(name, "32M", "pool") for name in ("one", "two")]
        self.second = f"{directory / 'two'}={self.paths[1]}"
        self.guest.run(f"mkdir -p {_PLACE}; rm -f {_PLACE}/*")
        self.write(*self.paths)
        self.run("--also", self.second)

    def write(self, *paths: str) -> None:
        """Change a quarter of a MiB at the beginning of volumes."""
        for path in paths:
            self.guest.run(f"dd if=/dev/urandom of={path} bs=64K count=4 conv=notrunc,fsync status=none")

    def words(self, *more: str) -> list[str]:
        """Return the words of a run of the first volume."""
        source = self.guest.url(self.paths[0])
        options = ("--lvm", "--keep-snapshot", "--digest", "md5", "--before", "true", *self.guest.arguments)
        return ["backup", self._name, source, *options, *more]

    def run(self, *more: str) -> list[dict[str, object]]:
        """Run well; return what it tells of each chain."""
        told = json.loads(commands.done("blockdiff", *self.words(*more, "--json")))
        return told if isinstance(told, list) else [told]

    def snapshots(self) -> set[str]:
        """Return the names of the snapshots that are there."""
        return {name for name in self.group.volumes() if name.startswith("bd_")}

    def kept(self) -> set[str]:
        """Return the names of those that are kept."""
        shown = self.guest.output(f"lvs --noheadings -o lv_name -S 'lv_tags={{\"blockdiff_kept\"}}' {self.group.name}")
        return set(shown.split())

    def held(self) -> str:
        """Return the root of the metadata snapshot that is held; ``-`` for none."""
        return self.guest.output(f"dmsetup status {self.group.name}-pool-tpool").split()[6]

    def wait_until_ended(self) -> None:
        """Wait until no agent is left."""
        wait_for(lambda: not agents(self.guest), "the end of the agent", PATIENCE_S)


@pytest.fixture
def thin(volume_group: VolumeGroup, tmp_path: Path) -> Thin:
    return Thin(volume_group, tmp_path)


@contextmanager
def within_thin_delta(thin: Thin) -> Iterator[Victim]:
    """Yield a run that stands there, with a metadata snapshot reserved."""
    thin.guest.put(_WRAPPER, _WAIT.encode())
    thin.guest.run(f"chmod 755 {_WRAPPER}; touch {_HOLD}")
    victim = Victim(thin.words())
    try:
        wait_for(lambda: thin.guest.run(f"test -e {_BEGUN}", check=False).returncode == 0, "thin_delta", PATIENCE_S)
        assert thin.held() != "-"
        yield victim
    finally:
        thin.guest.run(f"rm -f {_HOLD} {_WRAPPER}")
        victim.kill()


def test_an_agent_killed_within_thin_delta_leaves_what_later_runs_tell_how_to_release(thin: Thin) -> None:
    before = thin.snapshots()
    with within_thin_delta(thin) as victim:
        kill_agent(thin.guest)
        assert victim.ended() == 1
    (left,) = thin.snapshots() - before
    assert thin.held() != "-"
    thin.write(thin.paths[0])

    (told,) = thin.run()
    assert isinstance(told["notes"], list)
    removed, why = told["notes"]
    assert removed == f"removed the snapshot {thin.group.name}/{left}, which an earlier run left"
    release = f"dmsetup message {thin.group.name}-pool-tpool 0 release_metadata_snap"
    assert why.startswith("everything is read: the metadata snapshot of ") and why.endswith(release)
    assert thin.snapshots() == thin.kept() and len(thin.kept()) == 2

    thin.guest.run(release)
    thin.write(thin.paths[0])
    (told,) = thin.run()
    assert (told["notes"], told["changed_blocks"]) == ([], 4)
    assert thin.held() == "-"


def test_a_run_told_to_stop_within_thin_delta_leaves_nothing_reserved(thin: Thin) -> None:
    before = thin.snapshots()
    with within_thin_delta(thin) as victim:
        victim.process.send_signal(signal.SIGTERM)
        assert victim.ended() == 128 + signal.SIGTERM
        thin.wait_until_ended()
        assert (thin.held(), thin.snapshots()) == ("-", before)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_snapshot_kept_by_a_run_that_was_never_committed_is_removed_by_the_next(
    thin: Thin, number: signal.Signals
) -> None:
    """The first volume is done, and its snapshot kept, when the run ends in the middle of the second."""
    before = thin.kept()
    thin.write(thin.paths[1])
    victim = Victim(thin.words("--also", thin.second, "--bwlimit", "1K"))
    try:
        wait_for(lambda: len(thin.kept() - before) == 1 and len(thin.kept()) == 2, "a kept snapshot", PATIENCE_S)
        (uncommitted,) = thin.kept() - before
        victim.process.send_signal(number)
        victim.ended()
    finally:
        victim.kill()
    thin.wait_until_ended()
    assert thin.snapshots() == thin.kept()

    one, two = thin.run("--also", thin.second)
    assert one["notes"] == [
        f"removed the snapshot {thin.group.name}/{uncommitted}, which an earlier run left",
        "everything is read: the snapshot that the last run kept is not there",
    ]
    assert (two["notes"], two["changed_blocks"]) == ([], 4)
    assert (one["generation"], two["generation"]) == (2, 2)
    assert thin.snapshots() == thin.kept() and len(thin.kept()) == 2 and uncommitted not in thin.kept()
