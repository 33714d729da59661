"""Devices that must not be overwritten: in use by whatever there is, or with data wherever it is."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.restore import contents, devicetarget, inuse
from blockdiff.shared import devices
from blockdiff.shared.errors import TargetError
from tests import chains, commands, conftest, loop
from tests.chains import DAYS, SmallChain

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


@pytest.fixture
def backing(large_tmp_path: Path) -> Path:
    """A file of 64 MiB that takes no room."""
    path = large_tmp_path / "backing"
    path.touch()
    os.truncate(path, 64 * MIB)
    return path


@pytest.fixture
def device(backing: Path) -> Iterator[Path]:
    """A blank loop device on `backing`."""
    with loop.device(backing) as path:
        yield path


def refused(*arguments: str | Path) -> str:
    """Return what a restore says that exits 1."""
    result = commands.run("blockdiff", "restore", *arguments)
    assert (result.returncode, result.stdout) == (1, b""), result
    return result.stderr.decode()


# A device that is not there


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("no-such-device", "lvchange -a y GROUP/VOLUME"),
        ("no-such-group/volume", "lvchange -a y no-such-group/volume"),
        ("mapper/no-such-volume", "lvchange -a y GROUP/VOLUME"),
        ("disk/by-id/no-such-disk", "lvchange -a y GROUP/VOLUME"),
    ],
)
def test_no_file_is_made_under_dev(chain: SmallChain, name: str, hint: str) -> None:
    path = Path("/dev") / name
    try:
        for words in ([], ["--force"], ["--dry-run"]):
            message = refused(*words, chain.name, path)
            assert f"{path} is not a block device, and a file under /dev would be in memory" in message
            assert hint in message
            assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_a_link_to_a_device_that_is_not_there_is_not_replaced(chain: SmallChain, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to("/dev/no-such-group/volume")
    message = refused("--force", chain.name, link)
    assert f"{link} is not a block device" in message and "lvchange -a y no-such-group/volume" in message
    assert link.is_symlink() and not link.exists()


def test_a_file_that_was_made_under_dev_before_is_refused(chain: SmallChain) -> None:
    conftest.require(os.access("/dev", os.W_OK), "the right to make files in /dev")
    path = Path("/dev/blockdiff-made-before")
    path.write_bytes(b"a mistake")
    try:
        assert f"{path} is not a block device" in refused("--force", chain.name, path)
        assert path.read_bytes() == b"a mistake"
    finally:
        path.unlink()


def test_the_original_s_merge_makes_no_file_under_dev(chain: SmallChain) -> None:
    path = Path("/dev/no-such-device")
    try:
        result = commands.run("blockdiff_merge", path, stdin=chain.file(".1.gz").read_bytes())
        assert result.returncode == 1 and f"{path} is not a block device".encode() in result.stderr
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


# A device that somebody uses


def test_a_device_that_a_mounted_loop_device_is_on_is_refused(chain: SmallChain, device: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    with loop.device(device) as upper:
        subprocess.run([conftest.require_program("mkfs.ext2"), "-q", upper], check=True, timeout=60)
        subprocess.run(["mount", upper, tmp_path / "mounted"], check=True, timeout=60)
        try:
            message = refused("--force", chain.name, device)
            merged = commands.run("blockdiff_merge", device, stdin=chain.file(".1.gz").read_bytes())
        finally:
            subprocess.run(["umount", tmp_path / "mounted"], check=True, timeout=60)
    said = f"{device} is in use: the loop device {upper} is on it"
    assert said in message and merged.returncode == 1 and said in merged.stderr.decode()


def test_a_device_that_a_loop_device_is_on_is_refused(chain: SmallChain, device: Path) -> None:
    with loop.device(device) as upper:
        assert f"{device} is in use: the loop device {upper} is on it" in refused("--force", chain.name, device)
    assert device.read_bytes() == bytes(64 * MIB)


def test_a_device_that_a_process_has_open_is_refused(chain: SmallChain, device: Path) -> None:
    """As a guest has that runs on it."""
    with device.open("rb") as opened, subprocess.Popen(["sleep", "600"], stdin=opened) as process:
        opened.close()
        try:
            message = refused("--force", chain.name, device)
        finally:
            process.kill()
    assert f"{device} is in use: sleep (process {process.pid}) has it open" in message
    assert device.read_bytes() == bytes(64 * MIB)


def test_a_part_of_a_disk_and_the_disk_are_in_use_together(chain: SmallChain, device: Path) -> None:
    subprocess.run([conftest.require_program("addpart"), device, "1", "2048", "2048"], check=True, timeout=60)
    part = Path(f"{device}p1")
    try:
        for opened, target in ((part, device), (device, part)):
            with opened.open("rb"):
                assert f"{target} is in use: " in refused("--force", chain.name, target)
    finally:
        subprocess.run([conftest.require_program("delpart"), device, "1"], check=True, timeout=60)


def test_a_volume_that_only_device_mapper_knows_to_be_open_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev" / "block" / "4095:7" / "dm").mkdir(parents=True)
    monkeypatch.setattr(devices, "SYS", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    program = tmp_path / "dmsetup"
    for count, expected in (("0", []), ("2", ["`dmsetup info` counts 2 users, but no process of this"])):
        program.write_text(f'#!/bin/sh\n[ "$*" = "info -c --noheadings -o open -j 4095 -m 7" ] && echo {count}\n')
        program.chmod(0o755)
        found = inuse.users_of_device(os.makedev(4095, 7))
        assert len(found) == len(expected) and all(map(str.startswith, found, expected))
    program.write_text("#!/bin/sh\nexit 1\n")
    assert inuse.users_of_device(os.makedev(4095, 7)) == []


def test_whoever_only_looks_at_a_new_device_is_waited_for(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "udevadm"
    program.write_text(f'#!/bin/sh\necho "$*" > {tmp_path}/asked\nexit 1\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    looks = [["udev has it open"], ["blkid has it open"], ["blkid has it open"], []]
    monkeypatch.setattr(devicetarget, "SETTLE_S", 60)
    monkeypatch.setattr(inuse, "users_of_device", lambda _number: looks.pop(0))
    devicetarget.DeviceTarget(str(device), False, None).check()
    assert looks == [] and (tmp_path / "asked").read_text() == "settle --timeout=10\n"


# A device that holds data


@pytest.mark.parametrize(
    ("offset", "shown"),
    [(0, "0 bytes"), (5000, "4.9 KiB"), (32 * MIB, "32 MiB"), (63 * MIB, "63 MiB"), (64 * MIB - 1, "64 MiB")],
)
def test_data_is_found_wherever_it_is(chain: SmallChain, device: Path, offset: int, shown: str) -> None:
    with device.open("r+b") as file:
        file.seek(offset)
        file.write(b"x")
    message = refused(chain.name, device)
    assert f"{device} holds data, at offset {shown}" in message and "--force overwrites it" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("mkfs.ext4", "-q", "-L", "web 1"), "holds an ext4 file system labelled web 1"),
        (("mkfs.ext2", "-q"), "holds an ext2 file system"),
        (("mkswap", "-q"), "holds swap space"),
    ],
)
def test_what_a_device_holds_is_said(chain: SmallChain, device: Path, words: tuple[str, ...], said: str) -> None:
    subprocess.run(
        [conftest.require_program(words[0]), *words[1:], device], check=True, capture_output=True, timeout=60
    )
    before = device.read_bytes()
    assert re.search(rf"{device} {said}$", refused(chain.name, device), re.MULTILINE)
    assert device.read_bytes() == before
    commands.done("blockdiff", "restore", "--force", chain.name, device)
    assert device.read_bytes() == DAYS[2] + before[len(DAYS[2]) :]


@pytest.mark.parametrize(
    ("printed", "status", "said"),
    [
        ("PTTYPE=gpt", 0, "a partition table (gpt)"),
        ("TYPE=LVM2_member\nUSAGE=raid", 0, "a physical volume of LVM"),
        ("TYPE=ceph\nUSAGE=other", 0, "data of the type ceph"),
        ("", 8, "signatures of several kinds"),
        ("", 2, None),
    ],
)
def test_what_blkid_says_becomes_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str, status: int, said: str | None
) -> None:
    program = tmp_path / "blkid"
    program.write_text(f"#!/bin/sh\ncat <<'end'\n{printed}\nend\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with open("/dev/null", "rb") as nothing:
        assert contents.found_on("/dev/null", nothing.fileno(), 0) == said


def test_without_blkid_the_bytes_tell(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([conftest.require_program("mkfs.ext4"), "-q", device], check=True, timeout=60)
    monkeypatch.setattr(shutil, "which", lambda *_arguments, **_keywords: None)
    with pytest.raises(TargetError, match=f"{device} holds data, at offset 1 KiB"):
        devicetarget.DeviceTarget(str(device), False, None).check()


# What is written


def test_what_is_zero_already_is_left_alone(large_tmp_path: Path, device: Path, backing: Path) -> None:
    """A thin volume would give room to whatever is written, even to zeros, and so does the file behind this device."""
    chain = chains.new_chain(large_tmp_path)
    chain.add(b"a" * MIB + bytes(40 * MIB) + b"b" * MIB, Options())
    commands.done("blockdiff", "restore", chain.name, device)
    assert device.read_bytes() == chain.images[1] + bytes(22 * MIB)
    assert backing.stat().st_blocks * 512 < 4 * MIB


@pytest.mark.parametrize("salvages", [False, True])
def test_a_restore_that_is_stopped_says_that_the_device_is_incomplete(
    large_tmp_path: Path, device: Path, salvages: bool
) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(os.urandom(16 * MIB), Options(compression="none"))
    strace = [conftest.require_strace(), "-f", "-qq", "-o", "/dev/null", "-e", "trace=pwrite64"]
    strace += ["-e", "inject=pwrite64:signal=SIGTERM:when=4"]
    words = ["--salvage"] if salvages else []
    result = commands.run("blockdiff", "restore", *words, chain.name, device, under=strace)
    assert result.returncode not in (0, 3, 5)
    said = result.stderr.decode()
    size = r"(0 bytes|[0-9.]+ [KM]iB) of 16 MiB"
    assert re.search(rf"warning: {device} is incomplete now: {size} of generation 1 were written over", said), said
    assert "stopped by SIGTERM" in said
    assert "holds data" in refused(chain.name, device)
