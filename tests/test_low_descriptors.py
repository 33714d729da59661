"""The original's commands under callers that have low descriptors open, or standard streams closed."""

import fcntl
import os
import random
import shutil
import subprocess
import sys
import termios
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests import commands
from tests.mariadb import wait_for
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
        ("blockdiff_dump", "6>&-", "descriptor 6 is not open for writing: the new digest table has no output"),
        ("blockdiff_dump", "6</dev/null", "descriptor 6 is not open for writing: the new digest table has no output"),
        ("blockdiff_dump", "6>/dev/null >&-", "descriptor 1 is not open for writing: the delta has no output"),
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


def test_a_delta_goes_into_a_pipe_that_does_not_wait(tmp_path: Path) -> None:
    """As ssh leaves one that it shares."""
    image = random.Random(1).randbytes(300_000)
    (tmp_path / "image").write_bytes(image)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    room = fcntl.fcntl(writing, fcntl.F_GETPIPE_SZ)
    words = ["sh", "-c", 'exec "$@" 5<&- 6>"$NEW"', "sh", sys.executable, str(commands.BIN / "blockdiff_dump")]
    environment = {"PATH": commands.PATH, "BLOCKSIZE": "4096", "NEW": str(tmp_path / "new")}
    with subprocess.Popen([*words, str(tmp_path / "image")], stdout=writing, env=environment) as child:
        os.close(writing)
        try:
            wait_for(lambda: child.poll() is not None or waiting(reading) > room - 4096, "that nothing more fits")
        finally:
            with os.fdopen(reading, "rb") as file:
                delta = file.read()
    assert (child.returncode, delta) == (0, dumped(image, 4096)[0])


@pytest.mark.parametrize("program", ["blockdiff_dump", "blockdiff_merge"])
def test_what_comes_from_a_pipe_that_does_not_wait_is_waited_for(program: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    words = ["sh", "-c", 'exec "$@" 5<&- 6>"$NEW"', "sh", sys.executable, str(commands.BIN / program)]
    environment = {"PATH": commands.PATH, "BLOCKSIZE": str(BLOCK), "NEW": str(tmp_path / "new")}
    arguments = [str(tmp_path / "image")] if program == "blockdiff_merge" else []
    given = IMAGES[0] if program == "blockdiff_dump" else (GOLDEN / "own-none.1").read_bytes()
    with subprocess.Popen([*words, *arguments], stdin=reading, stdout=subprocess.PIPE, env=environment) as child:
        with os.fdopen(writing, "wb", buffering=0) as file:
            file.write(given[:100])
            wait_for(lambda: waiting(reading) == 0, "that it has read all that there is, and wants more")
            file.write(given[100:])
        os.close(reading)
        got, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert program == "blockdiff_merge" or got == dumped(IMAGES[0], BLOCK)[0]
    assert program == "blockdiff_dump" or (tmp_path / "image").read_bytes() == IMAGES[0]


def waiting(fd: int) -> int:
    """Return how many bytes are in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def test_a_delta_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Reading a process's memory fails where nothing is mapped: at its beginning."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        result = subprocess.run(
            [sys.executable, commands.BIN / "blockdiff_merge", tmp_path / "image"],
            stdin=memory,
            capture_output=True,
            timeout=60,
            check=False,
        )
    said = "blockdiff: cannot read the delta on standard input: Input/output error\n"
    assert (result.returncode, result.stderr.decode()) == (1, said)
    assert not (tmp_path / "image").exists()
