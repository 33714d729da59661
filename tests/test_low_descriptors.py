"""The original's commands under callers that have low descriptors open, or standard streams closed."""

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import commands
from tests.protocol import BLOCK, GOLDEN, IMAGES, dumped
from tests.sshd import Sshd

#: What a caller has done to descriptors 3 and 4, such as `while read -u3`, and to standard input.
CALLERS = ["", "3</dev/null", "3>/dev/null 4>/dev/null", "4</dev/null", "3</dev/null 4</dev/null 7>/dev/null", "<&-"]
OLD = GOLDEN / "perl-plain.1.md5"


@pytest.fixture
def ssh(sshd: Sshd, tmp_path: Path) -> Mapping[str, str]:
    """An environment whose `ssh` finds the test's sshd."""
    directory = tmp_path / "path"
    directory.mkdir()
    options = " ".join(f"-o '{option}'" for option in [*sshd.options, f"Port={sshd.port}"])
    wrapper = directory / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o700)
    return {"PATH": f"{directory}:{commands.PATH}"}


def run(
    redirected: str, program: str, *arguments: str | Path, env: Mapping[str, str] | None = None, stdin: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, commands.BIN / program, *arguments],
        env={"PATH": commands.PATH, "BLOCKSIZE": str(BLOCK), **(env or {})},
        input=stdin,
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("caller", CALLERS)
def test_dump_takes_nothing_of_ours_for_the_protocol(caller: str, old: bool, tmp_path: Path) -> None:
    tables = f"6>'{tmp_path}/new' " + (f"5<'{OLD}'" if old else "5<&-")
    result = run(f"{caller} {tables}", "blockdiff_dump", GOLDEN / "image.2")
    assert (result.returncode, result.stderr) == (0, b"")
    expected = dumped(IMAGES[1], BLOCK, OLD.read_bytes() if old else None)
    assert (result.stdout, (tmp_path / "new").read_bytes()) == expected


@pytest.mark.parametrize("caller", ["3</dev/null", "3>/dev/null 4>/dev/null", "<&-"])
def test_a_dump_through_ssh_takes_nothing_of_ours_for_the_protocol(
    caller: str, sshd: Sshd, ssh: Mapping[str, str], tmp_path: Path
) -> None:
    redirected = f"{caller} 5<&- 6>'{tmp_path}/new'"
    result = run(redirected, "ssh_blockdiff_dump", sshd.login, GOLDEN / "image.1", env=ssh)
    assert (result.returncode, result.stderr) == (0, b"")
    assert (result.stdout, (tmp_path / "new").read_bytes()) == dumped(IMAGES[0], BLOCK)


@pytest.mark.parametrize("caller", CALLERS)
def test_backup_and_its_command_get_their_own_descriptors(caller: str, tmp_path: Path) -> None:
    for number in (1, 2):
        result = run(caller, "blockdiff_backup", tmp_path / "disk", "blockdiff_dump", GOLDEN / f"image.{number}")
        assert (result.returncode, result.stderr) == (0, b"backup completed successfully\n")
        assert (tmp_path / f"disk.{number}").read_bytes() == (GOLDEN / f"perl-plain.{number}").read_bytes()


@pytest.mark.parametrize(
    ("program", "redirected", "words"),
    [
        ("blockdiff_dump", "<&- 6>/dev/null", "descriptor 0 is not open for reading: there is no image to read"),
        (
            "blockdiff_dump",
            "0>/dev/null 6>/dev/null",
            "descriptor 0 is not open for reading: there is no image to read",
        ),
        ("blockdiff_dump", "6>&-", "descriptor 6 is not open for writing: the new digest table has nowhere to go"),
        ("blockdiff_dump", "6</dev/null", "descriptor 6 is not open for writing: the new digest table has nowhere"),
        ("blockdiff_dump", "6>/dev/null >&-", "descriptor 1 is not open for writing: the delta has nowhere to go"),
        ("blockdiff_dump", "3>/dev/null 6>&-", "descriptor 6 is not open for writing: the new digest table has"),
        (
            "blockdiff_dump",
            "3>/dev/null 4>/dev/null 6>&-",
            "descriptor 6 is not open for writing: the new digest table",
        ),
        ("blockdiff_merge", "<&-", "descriptor 0 is not open for reading: there is no delta to apply"),
        ("ssh_blockdiff_dump", "3>/dev/null 6>&-", "descriptor 6 is not open for writing: the new digest table has"),
        ("ssh_lvm_dump", "3>/dev/null 4>/dev/null 6>&-", "descriptor 6 is not open for writing: the new digest table"),
    ],
)
def test_a_descriptor_that_the_caller_did_not_give_is_named(
    program: str, redirected: str, words: str, tmp_path: Path
) -> None:
    arguments = {"blockdiff_dump": [], "blockdiff_merge": [tmp_path / "image"]}.get(program, ["host", "/dev/x"])
    result = run(redirected, program, *arguments)
    assert (result.returncode, result.stdout) == (2, b"")
    assert f"blockdiff: {words}" in result.stderr.decode()
    assert not (tmp_path / "image").exists()


def test_a_caller_with_every_low_descriptor_open_is_served(tmp_path: Path) -> None:
    everything = " ".join(f"{number}</dev/null" for number in (3, 4, 7, 8, 9))
    result = run(f"{everything} 5<'{OLD}' 6>'{tmp_path}/new'", "blockdiff_dump", GOLDEN / "image.2")
    assert (result.returncode, result.stderr) == (0, b"")
    assert (result.stdout, (tmp_path / "new").read_bytes()) == dumped(IMAGES[1], BLOCK, OLD.read_bytes())
