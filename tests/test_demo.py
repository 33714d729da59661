"""`make demo` does what it says, with and without an sshd, and fails where something is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import commands, demo
from tests.conftest import require
from tests.sshd import Sshd

DEMO = Path(demo.__file__)
#: What the demo starts that is not ours.
_OTHER_PROGRAMS = ("cp", "cmp", "ls")


def run(tmp_path: Path, path: str = os.environ["PATH"], script: Path = DEMO) -> "subprocess.CompletedProcess[str]":
    (tmp_path / "tmp").mkdir()
    env = {**os.environ, "PATH": path, "TMPDIR": str(tmp_path / "tmp")}
    return subprocess.run(
        [sys.executable, script], env=env, capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )


def assert_shown(result: "subprocess.CompletedProcess[str]", tmp_path: Path) -> None:
    assert (result.returncode, result.stderr) == (0, ""), result
    shown = [line[2:] for line in result.stdout.splitlines() if line.startswith("$ blockdiff ")]
    assert [line.split()[1] for line in shown] == ["backup", "backup", "list", "verify", "restore", "restore"]
    assert shown[0] == shown[1]
    assert result.stdout.splitlines()[-1] == "All is well: both generations were restored exactly."
    assert "full" in result.stdout and "incremental" in result.stdout
    assert list((tmp_path / "tmp").iterdir()) == []


def test_the_demo_works_over_ssh_where_there_is_an_sshd(tmp_path: Path) -> None:
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    result = run(tmp_path)
    assert_shown(result, tmp_path)
    assert "over SSH" in result.stdout and "$ blockdiff backup backup/disk ssh://" in result.stdout


def test_the_demo_works_locally_where_there_is_no_ssh(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in _OTHER_PROGRAMS:
        found = shutil.which(name)
        assert found is not None
        (programs / name).symlink_to(found)
    result = run(tmp_path, str(programs))
    assert_shown(result, tmp_path)
    assert "no sshd on this machine" in result.stdout and "ssh://" not in result.stdout


def test_the_demo_fails_where_a_command_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sshd, "available", staticmethod(lambda: False))
    monkeypatch.setattr(commands, "BIN", tmp_path)
    (tmp_path / "blockdiff").write_text("import sys; sys.exit('no space')")
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 1
    assert capfd.readouterr().out.splitlines()[-1] == "The demo failed: blockdiff ended with status 1"


def test_the_demo_fails_where_a_restored_image_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sshd, "available", staticmethod(lambda: False))
    monkeypatch.setattr(commands, "BIN", tmp_path)
    fake = "import pathlib, sys; sys.argv[1] == 'restore' and pathlib.Path(sys.argv[3]).write_bytes(b'x')"
    (tmp_path / "blockdiff").write_text(fake)
    monkeypatch.chdir(tmp_path)
    assert demo.main() == 1
    assert capfd.readouterr().out.splitlines()[-1] == "The demo failed: cmp ended with status 1"


def test_the_demo_needs_no_test_tools() -> None:
    code = f"import sys; sys.argv=['x']; sys.path.insert(0, {str(DEMO.parent.parent)!r}); import tests.demo; "
    code += "print('pytest' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert found.stdout == "False\n"
