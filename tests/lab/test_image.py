"""Building the lab's image: a build that fails leaves nothing behind and touches nothing else."""

import os
from pathlib import Path

import pytest

from tests import mounts
from tests.conftest import require
from tests.lab import image


def fake(directory: Path, name: str, script: str) -> None:
    """Put a program of this name before the real one."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for programs that the build finds first; its cache is a new one."""
    require(image.missing() is None, str(image.missing()))
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setattr(image, "_PATH", f"{directory}:{image._PATH}")
    monkeypatch.setenv("BLOCKDIFF_LAB_CACHE", str(tmp_path / "cache"))
    return directory


def test_a_failed_build_says_at_what_and_leaves_nothing(tmp_path: Path, programs: Path) -> None:
    fake(programs, "mmdebstrap", "echo no such mirror >&2; exit 5")
    with pytest.raises(image.BuildError, match=r"the lab.s image: mmdebstrap failed\n.*no such mirror"):
        image.image()
    assert os.listdir(tmp_path / "cache") == ["lock"]


def test_what_the_build_mounts_is_not_seen_by_who_cleans_up(tmp_path: Path, programs: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("kept")
    mount = f"cd {tmp_path}/cache/building-* && mkdir -p root/dev && mount --bind {precious} root/dev && ls root/dev"
    fake(programs, "mmdebstrap", f"{mount}; exit 1")
    with pytest.raises(image.BuildError, match="\nfile"):
        image.image()
    assert (precious / "file").read_text() == "kept"
    assert os.listdir(tmp_path / "cache") == ["lock"]


def test_what_a_killed_build_left_is_removed(tmp_path: Path, programs: Path) -> None:
    left = tmp_path / "cache" / "building-left" / "root"
    left.mkdir(parents=True)
    fake(programs, "mmdebstrap", "exit 1")
    with pytest.raises(image.BuildError):
        image.image()
    assert os.listdir(tmp_path / "cache") == ["lock"]


def test_a_directory_in_which_something_is_mounted_is_never_removed(tmp_path: Path, programs: Path) -> None:
    left = tmp_path / "cache" / "building-left" / "root"
    left.parent.mkdir(parents=True)
    with mounts.tmpfs(left):
        (left / "file").write_text("kept")
        with pytest.raises(image.BuildError, match="something is mounted in it"):
            image.image()
        assert (left / "file").read_text() == "kept"


def test_another_list_of_packages_is_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    before = image._key()
    monkeypatch.setattr(image, "_requirements", lambda: ["other"])
    assert image._key() != before
