"""`ssh_lvm_dump` over a real sshd, on a stand-in for LVM: the original's lines, LVCREATE_PREFIX, no snapshot left."""

import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from blockdiff.database.accounts import Account
from tests import commands
from tests.fake_lvm import EXTENT, FakeLvm
from tests.mariadb import MariaDB, Running
from tests.protocol import dumped, run
from tests.sshd import Sshd

LIMIT_S = 120.0
MIB = 1 << 20
BLOCK = 1 << 20
IMAGE = random.Random(2).randbytes(4 * MIB) + bytes(MIB) + b"tail"
SUCCESS = "backup completed successfully"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeLvm]:
    """The host: the group pv with the volume lv, and 100 MiB free."""
    fake = FakeLvm(tmp_path / "host")
    fake.add_group("pv", 100 * MIB)
    fake.add_file("pv", "lv", IMAGE)
    yield fake
    fake.go()
    wait_until(lambda: not fake.snapshots())  # a run that failed does not wait for its agent to clean up


@pytest.fixture
def volume(fake: FakeLvm) -> Path:
    return fake.directory / "pv" / "lv"


@pytest.fixture
def env(sshd: Sshd, fake: FakeLvm, tmp_path: Path) -> Mapping[str, str]:
    """An environment whose `ssh` finds the test's sshd, where the login finds the stand-in for LVM."""
    login = f"#!/bin/sh\nPATH='{fake.commands}':$PATH\nexport PATH\nexec /bin/sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
    options = " ".join(f"-o '{option}'" for option in [*sshd.login_through(login), f"Port={sshd.port}"])
    directory = tmp_path / "path"
    directory.mkdir()
    wrapper = directory / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} {options} "$@"\n')
    wrapper.chmod(0o700)
    return {"PATH": f"{directory}:{commands.PATH}"}


def backup(name: Path, login: str, volume: Path, env: Mapping[str, str], *options: str) -> tuple[int, list[str]]:
    """Run `ssh_lvm_dump` under `blockdiff_backup`; return its exit status, and the lines that it said."""
    result = commands.run("blockdiff_backup", name, "ssh_lvm_dump", *options, login, volume, env=env)
    assert result.stdout == b""
    return result.returncode, result.stderr.decode().splitlines()


def started(
    name: Path, login: str, volume: Path, env: Mapping[str, str]
) -> "AbstractContextManager[subprocess.Popen[bytes]]":
    return commands.started("blockdiff_backup", name, "ssh_lvm_dump", login, volume, env=env)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("caller", ["", "3</dev/null", "3</dev/null 4</dev/null", "<&-"])
def test_it_writes_what_the_original_would_and_says_what_it_does(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, caller: str
) -> None:
    """Whatever low descriptors its caller has open, or closed."""
    result = run("ssh_lvm_dump", sshd.login, volume, new=tmp_path / "new", env=env, caller=caller)
    assert result.returncode == 0
    assert (result.stdout, (tmp_path / "new").read_bytes()) == dumped(IMAGE, BLOCK)
    note, creating, running, removing = result.stderr.decode().splitlines()
    assert note == "the snapshot of pv/lv gets 8 MiB"
    assert creating == "creating snapshot..."
    found = re.fullmatch(rf'running: ssh_blockdiff_dump "{sshd.login}" "(.*/bd_\w+)"\.\.\.', running)
    assert found is not None
    assert removing == f"removing snapshot {found[1]}..."


def test_under_backup_it_makes_a_chain(sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path) -> None:
    name = tmp_path / "lv"
    images = [IMAGE, IMAGE[:-1] + b"x", IMAGE * 2]
    for number, image in enumerate(images, 1):
        volume.write_bytes(image)
        status, said = backup(name, sshd.login, volume, env, "--gzip")
        assert (status, said[-1]) == (0, SUCCESS)
        assert [re.sub(r"bd_\w+", "BD", line) for line in said[-4:-1]] == [
            "creating snapshot...",
            f'running: ssh_blockdiff_dump --gzip "{sshd.login}" "{volume.parent}/BD"...',
            f"removing snapshot {volume.parent}/BD...",
        ]
        assert (tmp_path / "lv.ver").read_text() == f"{number}\n"
    assert (tmp_path / "lv.2.gz").stat().st_size < 4096
    for number, image in enumerate(images, 1):
        commands.done("blockdiff", "restore", f"{name}@{number}", tmp_path.parent / f"{tmp_path.name}-{number}")
        assert (tmp_path.parent / f"{tmp_path.name}-{number}").read_bytes() == image


def test_block_size_and_snapshot_size_are_the_environments(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, fake: FakeLvm
) -> None:
    environment = {**env, "BLOCKSIZE": "16384", "SNAPSHOT_SIZE": f"{2 * EXTENT}"}
    result = run("ssh_lvm_dump", sshd.login, volume, new=tmp_path / "new", env=environment)
    assert (result.returncode, result.stdout) == (0, dumped(IMAGE, 16384)[0])
    assert result.stderr.startswith(b"creating snapshot...\n")  # no word of the size
    (call,) = fake.calls("lvcreate")
    assert f"{2 * EXTENT}b" in call


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"SNAPSHOT_SIZE": "much"}, "much is not a snapshot size"),
        ({"BLOCKSIZE": "16k"}, "BLOCKSIZE is '16k', not a number of bytes"),
        ({"LVCREATE_PREFIX": "true"}, "the command in LVCREATE_PREFIX exited with status 0 without executing"),
    ],
)
def test_what_cannot_be_is_refused(
    sshd: Sshd,
    env: Mapping[str, str],
    volume: Path,
    tmp_path: Path,
    fake: FakeLvm,
    environment: Mapping[str, str],
    words: str,
) -> None:
    status, said = backup(tmp_path / "lv", sshd.login, volume, {**env, **environment})
    assert status == 1 and words in "\n".join(said) and SUCCESS not in said
    assert fake.calls("lvcreate") == []
    assert not (tmp_path / "lv.ver").exists()


def test_a_snapshot_that_cannot_be_made_is_a_failed_run(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, fake: FakeLvm
) -> None:
    fake.order("lvcreate", "fail_after")
    status, said = backup(tmp_path / "lv", sshd.login, volume, env)
    assert status == 1
    assert f"blockdiff: {sshd.login}: cannot make a snapshot of pv/lv: lvcreate" in "\n".join(said).replace(
        "ssh_lvm_dump: ", "blockdiff: "
    )
    assert said[-1] == "blockdiff: ssh_lvm_dump exited with status 1; the chain is as it was"
    assert not (tmp_path / "lv.ver").exists()


def test_the_command_around_it_holds_its_lock_while_the_snapshot_is_made(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, fake: FakeLvm
) -> None:
    count = f"grep -c lvcreate '{fake.directory}/calls' >> '{tmp_path}/log'"
    script = tmp_path / "lock"
    script.write_text(f'#!/bin/sh\n{count}\n"$@"\nstatus=$?\n{count}\nexit $status\n')
    script.chmod(0o755)
    status, said = backup(tmp_path / "lv", sshd.login, volume, {**env, "LVCREATE_PREFIX": f"'{script}'"})
    assert (status, said[-1]) == (0, SUCCESS)
    assert (tmp_path / "log").read_text().split() == ["0", "1"]


def test_a_lock_that_fails_afterwards_fails_the_run(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path
) -> None:
    prefix = 'run() { "$@"; exit 7; }; run'
    status, said = backup(tmp_path / "lv", sshd.login, volume, {**env, "LVCREATE_PREFIX": prefix})
    assert status == 1 and "the command in LVCREATE_PREFIX exited with status 7: whether it held" in "\n".join(said)
    assert not (tmp_path / "lv.ver").exists()


@pytest.fixture
def locker(mariadb: MariaDB, backup_account: Account) -> str:
    """The command line of `mysqllock` as it stands in the article, for an account with a password."""
    mariadb.run("GRANT PROCESS, RELOAD ON *.* TO backup@localhost")
    password = backup_account.password.replace("'", "'\\''")
    return f"mysqllock --user=backup --password='{password}' --socket={mariadb.socket}"


def test_mysqllock_around_it(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, fake: FakeLvm, mariadb: MariaDB, locker: str
) -> None:
    fake.order("lvcreate", "late")
    with started(tmp_path / "lv", sshd.login, volume, {**env, "LVCREATE_PREFIX": locker}) as child:
        wait_until((fake.directory / "waiting").exists)
        writer = Running(mariadb, "INSERT INTO shop.myisam VALUES (1)")
        writer.wait_until_it_waits()
        fake.go()
        _out, said = child.communicate(timeout=LIMIT_S)
        writer.finish()
    assert child.returncode == 0
    lines = said.decode().splitlines()
    assert lines[1:5] == [
        "creating snapshot...",
        "issuing lock statement: BACKUP STAGE START",
        "issuing lock statement: BACKUP STAGE BLOCK_COMMIT",
        "issuing unlock statement: BACKUP STAGE END",
    ]
    assert lines[-1] == SUCCESS and "hushed" not in said.decode()
    mariadb.assert_free()


def test_mysqllock_that_loses_its_lock_fails_the_run(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, fake: FakeLvm, mariadb: MariaDB, locker: str
) -> None:
    fake.order("lvcreate", "late")
    with started(tmp_path / "lv", sshd.login, volume, {**env, "LVCREATE_PREFIX": locker}) as child:
        wait_until((fake.directory / "waiting").exists)
        mariadb.kill_others()
        fake.go()
        _out, said = child.communicate(timeout=LIMIT_S)
    assert child.returncode == 1
    assert b"the lock was lost before the command had ended" in said and b"hushed" not in said
    assert b"the command in LVCREATE_PREFIX exited with status 1" in said
    assert not (tmp_path / "lv.ver").exists()
    wait_until(lambda: fake.snapshots() == [])


def test_a_password_in_the_prefix_is_never_told(
    sshd: Sshd, env: Mapping[str, str], volume: Path, tmp_path: Path, mariadb: MariaDB
) -> None:
    prefix = f"mysqllock --user=nobody --password=XXXX-4711 --socket={mariadb.socket}"
    status, said = backup(tmp_path / "lv", sshd.login, volume, {**env, "LVCREATE_PREFIX": prefix, "VERBOSE": "1"})
    text = "\n".join(said)
    assert status == 1 and "Access denied for user 'nobody'" in text and "4711" not in text


@pytest.mark.parametrize("arguments", [[], ["host"], ["host", "/dev/pv/lv", "more"]])
def test_wrong_usage_is_refused(arguments: list[str], tmp_path: Path) -> None:
    result = run("ssh_lvm_dump", *arguments, new=tmp_path / "new")
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"Usage: ssh_lvm_dump" in result.stderr


def test_help_names_the_environment() -> None:
    said = subprocess.run(
        ["ssh_lvm_dump", "--help"],
        env={**os.environ, "PATH": commands.PATH},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    for name in ("LVCREATE_PREFIX", "SNAPSHOT_SIZE", "BLOCKSIZE", "SSH_BLOCKDIFF_PREFIX"):
        assert name in said
