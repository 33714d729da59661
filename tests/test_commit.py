"""How a generation becomes part of a chain, and what stays where that fails."""

import dataclasses
import errno
import os
import re
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.backup import Options
from blockdiff.chain.commit import LockedChain, NewGeneration
from blockdiff.chain.durable import Directory
from blockdiff.original.command_backup import backup_with_command
from blockdiff.shared.errors import BusyError, ChainError, Interrupted, StorageError, UsageError
from tests import chains, commands, faults, processes
from tests.chains import DAYS, SmallChain
from tests.mariadb import wait_for

MAX_STEPS = 100


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.some_days(tmp_path, 1)


@pytest.mark.parametrize("step", ["open", "write", "fsync", "link", "rename"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_step_that_fails_leaves_the_chain_as_it_was(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    failures = 0
    for at in range(1, MAX_STEPS):
        before = chain.files()
        with faults.at_step(monkeypatch, at, number, (step,)) as faulty:
            try:
                chain.add(DAYS[1])
            except StorageError as error:
                assert error.exit_status == 1
                assert str(chain.directory) in error.message and os.strerror(number) in error.message
            else:
                assert faulty.failed is None
                break
        failures += 1
        if chain.last() == 2:  # nothing but the very last step, which makes a complete generation durable
            assert step == "fsync" and chain.file(".ver").read_bytes() == b"2\n"
            chain.images[2] = DAYS[1]
            break
        assert chain.files() == before
    assert failures >= {"open": 5, "write": 6, "fsync": 7, "link": 3, "rename": 1}[step]
    chain.assert_sound()
    chain.add(DAYS[2])
    chain.assert_sound()


def test_a_manifest_that_could_not_be_read_again_leaves_the_chain_as_it_was(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = chain.files()
    with monkeypatch.context() as patch:
        patch.setattr(backup, "_versions", lambda session: {"host_python": "3" * (16 << 20)})
        with pytest.raises(ChainError, match="the manifest of generation 2 could not be read again"):
            chain.add(DAYS[1])
    assert chain.files() == before
    chain.add(DAYS[1])
    chain.assert_sound()


def test_the_first_error_is_told_even_where_nothing_can_be_removed(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that turned read-only fails every step from then on."""
    with faults.at_step(monkeypatch, 2, errno.EROFS, ("link",)) as faulty:
        real = os.unlink

        def unlink(name: str, *, dir_fd: int) -> None:
            if faulty.failed:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            real(name, dir_fd=dir_fd)

        monkeypatch.setattr(os, "unlink", unlink)
        with pytest.raises(StorageError, match=r"cannot create .*disk\.2\.gz: Read-only file system"):
            chain.add(DAYS[1])
        monkeypatch.setattr(os, "unlink", real)
    chain.add(DAYS[1])
    chain.assert_sound()


def test_a_name_that_is_taken_is_never_overwritten(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who ignores the lock puts a file there just before the link."""
    link = os.link

    def late(*arguments: object, **keywords: object) -> None:
        if not chain.file(".2.sha256").exists():
            chain.file(".2.sha256").write_bytes(b"not ours")
        link(*arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "link", late)
    with pytest.raises(StorageError, match=r"cannot create .*disk\.2\.sha256: File exists"):
        chain.add(DAYS[1])
    assert chain.file(".2.sha256").read_bytes() == b"not ours"
    assert not chain.file(".2.gz").exists() and chain.temporary() == []


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_link_that_fails_is_undone_where_a_file_system_cannot_tell_that_two_names_are_one_file(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """As some that are mounted over a network: each name has an inode number of its own."""
    before = chain.files()
    monkeypatch.setattr(Directory, "are_same", lambda *_arguments: False)
    with faults.at_step(monkeypatch, at, errno.EIO, ("link",)), pytest.raises(StorageError):
        chain.add(DAYS[1])
    assert chain.files() == before


@pytest.mark.parametrize("days", [0, 1])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_signal_just_behind_a_link_leaves_the_chain_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, at: int
) -> None:
    """The file has its name, and Python has not told anybody yet."""
    chain = chains.some_days(tmp_path, days)
    before, link, links = chain.files(), os.link, []

    def interrupted(*arguments: object, **keywords: object) -> None:
        link(*arguments, **keywords)  # type: ignore[arg-type]
        links.append(arguments)
        if len(links) == at:
            raise Interrupted("stopped by SIGTERM")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(os, "link", interrupted)
        chain.add(DAYS[days])
    assert chain.files() == before
    assert chain.add(DAYS[days]).recovered == []
    chain.assert_sound()


@pytest.mark.parametrize("how", ["of a source", "of a command"])
def test_a_signal_while_the_files_are_made_leaves_none(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    def enter(new: NewGeneration) -> NewGeneration:
        os.kill(os.getpid(), signal.SIGTERM)
        return new

    before = chain.files()
    monkeypatch.setattr(NewGeneration, "__enter__", enter)
    with processes.interrupting(signal.SIGTERM), pytest.raises(Interrupted):
        if how == "of a source":
            chain.add(DAYS[1])
        else:
            backup_with_command(str(chain.directory / "other"), ["false"], "gzip")
    assert chain.files() == before


def test_files_are_private_and_read_only(chain: SmallChain) -> None:
    commands.done("blockdiff", "backup", chain.name, chain.source)
    modes = {suffix: chain.file(suffix).stat().st_mode & 0o777 for suffix in (".2.gz", ".2.sha256", ".2.json", ".ver")}
    assert modes == {".2.gz": 0o400, ".2.sha256": 0o400, ".2.json": 0o400, ".ver": 0o600}


# Two runs at once


def is_locked(chain: SmallChain) -> bool:
    """Tell whether a process holds the chain's lock; to try it could be what the process meets."""
    inode = chain.directory.joinpath(f".{chain.base}.lock").stat().st_ino
    return any(line.split()[5].endswith(f":{inode}") for line in Path("/proc/locks").read_text().splitlines())


@contextmanager
def held_up(chain: SmallChain) -> "Iterator[tuple[subprocess.Popen[bytes], int]]":
    """Yield a run that holds the lock, and whose agent begins only when something is written to the descriptor."""
    gate = chain.source.parent / "gate"
    os.mkfifo(gate)
    prefix = f'sh -c \'read line < "{gate}"; exec "$@"\' sh'
    with (
        commands.started("blockdiff", "backup", chain.name, chain.source, env={"SSH_BLOCKDIFF_PREFIX": prefix}) as run,
        gate.open("wb", buffering=0) as file,  # returns when the prefix has opened it
    ):
        wait_for(lambda: is_locked(chain), "the lock of the run")
        yield run, file.fileno()


def test_a_second_run_exits_4_and_touches_nothing(chain: SmallChain) -> None:
    before = chain.files()
    with held_up(chain) as (first, gate):
        second = commands.run("blockdiff", "backup", chain.name, chain.source)
        assert second.returncode == 4
        assert f"another run is busy with {chain.name}" in second.stderr.decode()
        assert chain.files() == before
        for command in ("list", "verify"):
            assert commands.run("blockdiff", command, chain.name).returncode == 0
        assert chain.restored() == DAYS[0]
        os.write(gate, b"go\n")
        assert first.wait(60) == 0
    chain.images[2] = DAYS[0]
    chain.assert_sound()


def test_the_lock_ends_with_the_process_that_held_it(chain: SmallChain) -> None:
    with held_up(chain) as (first, _gate):
        with pytest.raises(BusyError):
            chain.add(DAYS[1])
        first.kill()
        first.wait(60)
    chain.add(DAYS[1])
    chain.assert_sound()


def test_a_lock_ends_with_its_run_though_a_child_is_just_being_started(chain: SmallChain) -> None:
    """Between its making and the beginning of its program it has all descriptors, those of other threads too."""
    with LockedChain(chain.name) as locked:
        held = os.dup(locked._lock_fd)
    try:
        LockedChain(chain.name).close()
    finally:
        os.close(held)


# Names


@pytest.mark.parametrize("name", ["", ".", "..", "x/", "x/.", "x/..", "nul\0"])
def test_what_is_no_name_is_a_usage_error(name: str) -> None:
    with pytest.raises(UsageError, match="is not a NAME for a chain"):
        LockedChain(name)


def test_a_name_that_ends_like_a_generation_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a NAME cannot end like"):
        SmallChain(tmp_path, tmp_path / "source", "disk@2").add(DAYS[0])


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_chains_whose_names_look_like_each_others_files_keep_apart(tmp_path: Path, compression: str) -> None:
    options = Options(block_size=chains.BLOCK, compression=compression)
    one = chains.new_chain(tmp_path, "disk")
    others = [SmallChain(one.directory, one.source, base) for base in ("disk.1", "disk.1.2", "disk.", "disk-1", "d*sk")]
    for image in DAYS:
        for chain in (one, *others):
            chain.add(image, options)
    for chain in (one, *others):
        chain.assert_sound()
        assert chain.last() == 3


def test_a_signal_behind_the_rename_of_ver_undoes_nothing(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    """NAME.ver already says that the generation is there: then it must stay."""
    real = LockedChain.publish_version

    def publish(self: LockedChain, number: int) -> None:
        real(self, number)
        raise Interrupted("stopped by SIGTERM")

    with monkeypatch.context() as patch:
        patch.setattr(LockedChain, "publish_version", publish)
        with pytest.raises(Interrupted):
            chain.add(DAYS[1])
    assert chain.file(".ver").read_bytes() == b"2\n"
    assert not [name for name in chain.files() if name.endswith(".tmp")]
    chain.images[2] = DAYS[1]
    chain.assert_sound()
    chain.add(DAYS[2])
    chain.assert_sound()


def test_what_another_run_left_just_before_the_lock_was_had_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary names, which tell that it is incomplete, are about to be removed."""
    chain, lock = chains.new_chain(tmp_path), LockedChain._lock

    def lock_late(self: LockedChain) -> None:
        lock(self)
        for suffix in ".gz", ".sha256":
            temporary = chain.directory / f".disk.1{suffix}.tmp"
            temporary.write_bytes(b"of a run that died")
            os.link(temporary, chain.file(f".1{suffix}"))

    monkeypatch.setattr(LockedChain, "_lock", lock_late)
    with LockedChain(chain.name) as locked:
        assert (locked.last(), locked.generations) == (0, {})
        assert len(locked.notes) == 2


def test_a_chain_that_was_closed_holds_nothing_open(chain: SmallChain) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    with LockedChain(chain.name):
        assert len(os.listdir("/proc/self/fd")) == len(before) + 2
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_what_is_set_aside_gets_the_next_number_that_is_free(chain: SmallChain) -> None:
    with LockedChain(chain.name) as locked:
        names = []
        for _ in range(3):
            chain.file(".note").write_bytes(b"a file")
            names.append(locked.set_aside("disk.note"))
    assert names == ["disk.note.aside-1", "disk.note.aside-2", "disk.note.aside-3"]


def test_a_version_file_that_is_behind_is_put_right_at_once(chain: SmallChain) -> None:
    """Other tools read it, and the run that finds it may fail later."""
    chain.file(".ver").write_bytes(b"0\n")
    with LockedChain(chain.name) as locked:
        assert chain.file(".ver").read_bytes() == b"1\n"
        assert "was corrected" in locked.notes[0]


def test_a_file_that_is_replaced_is_whole_and_what_was_there_is_set_aside(chain: SmallChain) -> None:
    with LockedChain(chain.name) as locked:
        locked.replace("disk.note", lambda file: file.write(b"first"))
        locked.replace("disk.note", lambda file: file.write(b"second"))
        assert chain.temporary() == []
    assert (chain.file(".note").read_bytes(), chain.file(".note.aside-1").read_bytes()) == (b"second", b"first")


def test_a_replacement_that_cannot_be_written_leaves_what_was_there(chain: SmallChain) -> None:
    def fail(_file: object) -> None:
        raise StorageError("the disk is full")

    chain.file(".note").write_bytes(b"first")
    with LockedChain(chain.name) as locked, pytest.raises(StorageError, match="the disk is full"):
        locked.replace("disk.note", fail)
    assert chain.temporary() == [] and chain.file(".note").read_bytes() == b"first"


def test_a_version_file_that_cannot_be_put_right_is_told(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_self: LockedChain, _number: int) -> None:
        raise StorageError("the disk is full")

    chain.file(".ver").write_bytes(b"0\n")
    monkeypatch.setattr(LockedChain, "publish_version", fail)
    with pytest.raises(StorageError, match="the disk is full"):
        LockedChain(chain.name)
    assert chain.temporary() == [] and chain.file(".ver").read_bytes() == b"0\n"


def test_the_chain_s_identifier_is_that_of_the_newest_manifest(chain: SmallChain) -> None:
    made = chain.add(DAYS[1]).manifest
    with LockedChain(chain.name) as locked:
        first = locked.generations[1].manifest
        assert first is not None
        chain.file(".1.json").write_bytes(dataclasses.replace(first, chain="00" * 16).to_bytes())
        locked.reload()
        assert locked.chain_id() == made.chain


def test_a_new_chain_s_identifier_has_32_digits(tmp_path: Path) -> None:
    with LockedChain(chains.new_chain(tmp_path).name) as locked:
        assert re.fullmatch("[0-9a-f]{32}", locked.chain_id())


def test_a_generation_that_is_not_committed_holds_nothing_open(chain: SmallChain) -> None:
    with LockedChain(chain.name) as locked:
        before = sorted(os.listdir("/proc/self/fd"))
        with locked.begin(".gz", ".sha256"):
            assert len(os.listdir("/proc/self/fd")) == len(before) + 2
        assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_new_table_can_be_read_before_it_is_committed(chain: SmallChain) -> None:
    with LockedChain(chain.name) as locked, locked.begin(".gz", ".sha256") as new:
        new.table.write(struct.pack("<I", 64) + bytes(32))
        with new.open_table(32) as table:
            assert (table.block_size, table.digests(0, 1)) == (64, bytes(32))
