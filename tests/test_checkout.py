"""The commands in bin/ where nothing is installed yet."""

import shutil
import subprocess
import sys
from pathlib import Path

from tests.commands import BIN


def run_copy(tmp_path: Path, *options: str) -> "subprocess.CompletedProcess[bytes]":
    shutil.copytree(BIN, tmp_path / "bin", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, *options, str(tmp_path / "bin" / "blockdiff"), "--version"]
    return subprocess.run(command, capture_output=True, timeout=60, check=False)


def test_missing_packages_are_told_with_what_sets_them_up(tmp_path: Path) -> None:
    result = run_copy(tmp_path, "-S")  # a Python that sees no installed packages
    assert result.returncode == 1
    assert result.stderr.decode() == (
        f"blockdiff: the packages it needs are not installed here; `make -C {tmp_path} demo` sets them up\n"
    )


def test_a_virtual_environment_that_is_a_symbolic_link_is_used(tmp_path: Path) -> None:
    """It had been started again and again, for ever."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    result = run_copy(tmp_path)
    assert result.returncode == 0 and result.stdout.startswith(b"blockdiff ")


def test_the_virtual_environment_of_the_checkout_is_used(tmp_path: Path) -> None:
    python = tmp_path / ".venv" / "bin" / "python3"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nshift\necho "run by its own python: $*"\n')
    python.chmod(0o755)
    assert run_copy(tmp_path).stdout == b"run by its own python: --version\n"
