"""Restoring to files and devices: what is refused, what is written, and what is left behind."""

import dataclasses
import errno
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff import merge
from blockdiff.backup import Options
from blockdiff.chain.generations import Chain, Generation
from blockdiff.format.digesttable import TableWriter
from blockdiff.restore import filetarget, target
from blockdiff.shared.blocks import Hasher, digest_named
from blockdiff.shared.errors import DamagedError, TargetError
from tests import chains, commands, conftest, loop, mounts
from tests.chains import BLOCK, DAYS, MemoryTarget, SmallChain

MIB = 1 << 20


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


@pytest.fixture
def device(large_tmp_path: Path) -> Iterator[Path]:
    """A device of 2 MiB that is full of old bytes; its file is ``backing`` in `large_tmp_path`."""
    backing = large_tmp_path / "backing"
    backing.write_bytes(b"\xee" * 2 * MIB)
    with loop.device(backing) as path:
        yield path


def refused(*arguments: str | Path) -> str:
    """Return what a restore says that exits 1."""
    result = commands.run("blockdiff", "restore", *arguments)
    assert (result.returncode, result.stdout) == (1, b""), result
    return result.stderr.decode()


# Files


def test_each_generation_and_the_newest_one_restore(chain: SmallChain, tmp_path: Path) -> None:
    for number, image in enumerate(DAYS, 1):
        assert commands.done("blockdiff", "restore", f"{chain.name}@{number}", tmp_path / str(number)) == b""
        assert (tmp_path / str(number)).read_bytes() == image
    commands.done("blockdiff", "restore", chain.name, "newest", cwd=tmp_path)
    assert (tmp_path / "newest").read_bytes() == DAYS[2]
    assert (tmp_path / "newest").stat().st_mode & 0o777 == 0o600


def test_an_existing_file_is_kept_without_force_and_replaced_at_once_with_it(chain: SmallChain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    assert f"{out} exists" in refused(chain.name, out)
    assert out.read_bytes() == b"precious"
    commands.done("blockdiff", "restore", "--force", chain.name, out)
    assert out.read_bytes() == DAYS[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "out", "source"]


def test_whoever_has_a_file_open_that_is_replaced_is_warned_of(chain: SmallChain, tmp_path: Path) -> None:
    """The old file is intact for them: it is not written to. But what they write is in no file that has a name."""
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    with out.open("rb") as held:
        result = commands.run("blockdiff", "restore", "--force", chain.name, out)
        assert held.read() == b"precious"
    assert (result.returncode, result.stdout) == (3, b"")
    said = f"warning: {out} is new, but the file that it replaced is still in use: "
    assert said in result.stderr.decode() and f"(process {os.getpid()}) has it open" in result.stderr.decode()
    assert out.read_bytes() == DAYS[2]


def test_a_link_is_replaced_and_what_it_points_to_kept(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "out").symlink_to("precious")
    assert "exists" in refused(chain.name, tmp_path / "out")
    commands.done("blockdiff", "restore", "--force", chain.name, tmp_path / "out")
    assert (tmp_path / "precious").read_bytes() == b"precious"
    assert not (tmp_path / "out").is_symlink() and (tmp_path / "out").read_bytes() == DAYS[2]


def test_a_dangling_link_counts_as_existing(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("nowhere")
    assert "exists" in refused(chain.name, tmp_path / "out")


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with filetarget.FileTarget(str(out), force=False) as writing:
        writing.write(0, memoryview(b"new"))
        out.write_bytes(b"precious")
        with pytest.raises(TargetError, match="exists"):
            writing.finish(3)
    assert out.read_bytes() == b"precious" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("path", ["{chain}/out", "{chain}/../backup/out", "{chain}/disk.1.gz", "{link}/out"])
def test_the_chains_own_directory_is_refused_by_whatever_path(chain: SmallChain, tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(chain.directory)
    before = chain.files()
    place = path.format(chain=chain.directory, link=tmp_path / "link")
    assert "is in the directory of the chain itself" in refused("--force", chain.name, place)
    assert chain.files() == before


def test_the_chains_own_directory_is_refused_by_a_bare_name(chain: SmallChain) -> None:
    result = commands.run("blockdiff", "restore", "disk", "out", cwd=chain.directory)
    assert result.returncode == 1 and b"is in the directory of the chain itself" in result.stderr


def test_targets_that_cannot_be_are_refused(chain: SmallChain, tmp_path: Path) -> None:
    assert f"{tmp_path} is a directory" in refused("--force", chain.name, tmp_path)
    missing = refused(chain.name, tmp_path / "no" / "out")
    assert "No such file or directory" in missing and "create the directory first" in missing
    assert "is neither a file nor a block device" in refused("--force", chain.name, "/dev/null")
    assert "Not a directory" in refused(chain.name, tmp_path / "source" / "out")
    assert "File name too long" in refused(chain.name, tmp_path / ("x" * 256))


def test_a_name_as_long_as_a_name_can_be_is_restored_to(chain: SmallChain, tmp_path: Path) -> None:
    for name in ("x" * 255, "\u20ac" * 85):
        commands.done("blockdiff", "restore", chain.name, tmp_path / name)
        assert (tmp_path / name).read_bytes() == DAYS[2]


def test_zero_blocks_are_holes_in_files(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(b"a" * MIB + bytes(30 * MIB) + b"b" * MIB, Options())
    chain.add(bytes(31 * MIB) + b"b" * MIB + bytes(3), Options())
    commands.done("blockdiff", "restore", chain.name, large_tmp_path / "out")
    assert (large_tmp_path / "out").read_bytes() == chain.images[2]
    assert (large_tmp_path / "out").stat().st_blocks * 512 < 2 * MIB


def with_fault(call: str, fault: str) -> list[str]:
    """Return the command under which the system call `call` fails, or is another thing, as ``strace`` says."""
    return [
        conftest.require_strace(),
        "-f",
        "-qq",
        "-o",
        os.devnull,
        "-e",
        f"trace={call}",
        "-e",
        f"inject={call}:{fault}",
    ]


@pytest.mark.parametrize("number", ["EPERM", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_hard_links_is_restored_to(chain: SmallChain, tmp_path: Path, number: str) -> None:
    place = tmp_path / "place"
    place.mkdir()
    without_links = with_fault("link", f"error={number}")
    result = commands.run("blockdiff", "restore", chain.name, place / "out", under=without_links)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
    assert (place / "out").read_bytes() == DAYS[2] and [path.name for path in place.iterdir()] == ["out"]


def test_without_hard_links_a_file_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_link(*_arguments: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_link)
    out = tmp_path / "out"
    with filetarget.FileTarget(str(out), force=False) as writing:
        out.write_bytes(b"precious")
        with pytest.raises(TargetError, match="exists"):
            writing.finish(3)
    assert out.read_bytes() == b"precious" and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", ["EINVAL", "EIO"])
def test_a_directory_that_cannot_be_synced_is_warned_of(chain: SmallChain, tmp_path: Path, number: str) -> None:
    out = tmp_path / "out"
    result = commands.run("blockdiff", "restore", chain.name, out, under=with_fault("fsync", f"error={number}:when=2"))
    assert result.returncode == 3
    said = f"warning: {out} is complete, but its name may not survive a power cut: cannot sync {tmp_path}: "
    assert said in result.stderr.decode()
    assert out.read_bytes() == DAYS[2]


def test_a_directory_that_only_takes_files_is_warned_of(chain: SmallChain, tmp_path: Path) -> None:
    """It may be written to and not be read, so that it cannot be opened to be synced."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    result = commands.run(
        *("blockdiff", "restore", chain.name, out), under=[*with_fault("openat", "error=EACCES"), "-P", str(out.parent)]
    )
    assert result.returncode == 3 and b"cannot sync" in result.stderr
    assert out.read_bytes() == DAYS[2]


def test_a_full_target_leaves_nothing_behind(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(os.urandom(3 * MIB), Options())
    with mounts.tmpfs(large_tmp_path / "small", "size=1m") as small:
        message = refused(chain.name, small / "out")
        assert f"cannot write {small}/out: No space left on device" in message
        assert list(small.iterdir()) == []


def test_a_failed_restore_leaves_what_was_there(chain: SmallChain, tmp_path: Path) -> None:
    content = chain.file(".1.gz").read_bytes()
    chain.file(".1.gz").write_bytes(content[:40])
    out = tmp_path / "out"
    out.write_bytes(b"precious")
    result = commands.run("blockdiff", "restore", "--force", chain.name, out)
    assert result.returncode == 5 and b"disk.1.gz" in result.stderr
    assert out.read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup", "out", "source"]


def test_a_restore_that_is_interrupted_leaves_nothing(chain: SmallChain, tmp_path: Path) -> None:
    def interrupt(length: int) -> None:
        raise KeyboardInterrupt

    place = tmp_path / "place"
    place.mkdir()
    with (
        Chain(chain.name) as found,
        pytest.raises(KeyboardInterrupt),
        target.open_target(str(place / "out"), False, None) as out,
    ):
        merge.merge(found.needed(3), out, interrupt)
    assert list(place.iterdir()) == []


# What is read and written


def test_each_block_is_written_once_newest_first(chain: SmallChain) -> None:
    recorded = MemoryTarget()
    with Chain(chain.name) as found:
        merge.merge(found.needed(3), recorded)
    offsets = [offset for offset, _ in recorded.writes]
    assert (sorted(offsets[:2]), offsets[2], sorted(offsets[3:])) == ([128, 256], 64, [0, 192])
    assert sum(length for _, length in recorded.writes) == len(DAYS[2])
    assert recorded.image == DAYS[2]


def test_only_deltas_that_are_needed_are_opened(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    real = merge.open_delta

    def record(generation: Generation) -> object:
        opened.append(generation.number)
        return real(generation)

    chain.add(chains.image_of("1", "2", "3", "4", "5", "6"))  # every block changed
    chain.add(chains.image_of("1", "2", "3", "4", "5", "7"))
    chain.add(None, Options(full=True))
    for number in (1, 2, 3):
        chain.file(f".{number}.gz").write_bytes(b"damaged")
    monkeypatch.setattr(merge, "open_delta", record)
    for number, expected in ((4, [4]), (5, [5, 4]), (6, [6])):
        opened.clear()
        assert chain.restored(number) == chain.images[number]
        assert opened == expected
    with pytest.raises(DamagedError, match=r"disk\.3\.gz"):
        chain.restored(3)


def test_a_restore_while_a_backup_runs_gives_what_was_complete_then(chain: SmallChain) -> None:
    with Chain(chain.name) as found:
        chain.add(DAYS[0])
        recorded = MemoryTarget()
        merge.merge(found.needed(found.last()), recorded)
    assert recorded.image == DAYS[2]


# Devices


def test_a_device_is_restored_exactly_over_stale_content(chain: SmallChain, device: Path) -> None:
    """Zero blocks are written, too: what is on the device is not zero."""
    assert "holds data" in refused(f"{chain.name}@1", device)
    assert device.read_bytes() == b"\xee" * 2 * MIB
    for number in (1, 2, 3):
        commands.done("blockdiff", "restore", "--force", f"{chain.name}@{number}", device)
        content = device.read_bytes()
        assert content[: len(DAYS[number - 1])] == DAYS[number - 1]
        assert content[BLOCK * 7 :] == b"\xee" * (2 * MIB - BLOCK * 7)


def test_a_blank_device_needs_no_force_and_a_link_leads_to_it(chain: SmallChain, device: Path, tmp_path: Path) -> None:
    device.write_bytes(bytes(2 * MIB))
    (tmp_path / "volume").symlink_to(device)
    commands.done("blockdiff", "restore", chain.name, tmp_path / "volume")
    assert device.read_bytes().rstrip(b"\0") == DAYS[2]
    assert (tmp_path / "volume").is_symlink()


def test_a_long_run_of_zeros_is_written_to_a_device(large_tmp_path: Path, device: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(b"x" + bytes(2 * MIB - 1), Options())
    commands.done("blockdiff", "restore", "--force", chain.name, device)
    assert device.read_bytes() == chain.images[1]


@pytest.mark.parametrize("manifests", [True, False])
def test_a_device_that_is_too_small_is_refused(large_tmp_path: Path, device: Path, manifests: bool) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(b"x" * (2 * MIB + 1), Options(delta_format=1))
    if manifests:
        said = f"{device} has 2097152 bytes (2 MiB), the image 2097153 (2 MiB)"
        assert said in refused("--force", chain.name, device)
        assert device.read_bytes() == b"\xee" * 2 * MIB
    else:
        chains.without_manifests(chain)
        said = refused("--force", chain.name, device)
        assert f"cannot write {device}: No space left on device" in said
        assert f"warning: {device} is incomplete now: " in said and "do not use it before a restore to it is" in said


def test_a_device_that_somebody_holds_is_refused(chain: SmallChain, device: Path) -> None:
    fd = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        message = refused("--force", chain.name, device)
    finally:
        os.close(fd)
    assert f"{device} is in use: " in message and f"(process {os.getpid()}) has it open" in message
    assert device.read_bytes() == b"\xee" * 2 * MIB


def test_a_mounted_device_is_refused(chain: SmallChain, device: Path, tmp_path: Path) -> None:
    mkfs = conftest.require_program("mkfs.ext2")
    subprocess.run([mkfs, "-q", device], check=True, timeout=60)
    (tmp_path / "mounted").mkdir()
    subprocess.run(["mount", device, tmp_path / "mounted"], check=True, timeout=60)
    try:
        message = refused("--force", chain.name, device)
        (tmp_path / "mounted" / "file").write_bytes(b"still there")
    finally:
        subprocess.run(["umount", tmp_path / "mounted"], check=True, timeout=60)
    assert f"{device} is in use: it is mounted on {tmp_path}/mounted" in message


def test_the_file_behind_a_loop_device_is_refused(chain: SmallChain, device: Path, large_tmp_path: Path) -> None:
    backing = large_tmp_path / "backing"
    assert f"{backing} is in use by a loop device, {device}" in refused("--force", chain.name, backing)
    assert backing.read_bytes() == b"\xee" * 2 * MIB


# Manifests that do not belong to their delta, and are sound by themselves


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"delta_format": 1}, "is not the delta that its manifest describes"),
        ({"block_size": 2 * BLOCK, "blocks": 3, "changed_blocks": 3}, "is not the delta that its manifest describes"),
        ({"image_size": len(DAYS[0]) - 1}, "has another image size than its manifest"),
    ],
)
def test_a_manifest_that_describes_another_delta_is_told(chain: SmallChain, changes: dict[str, int], said: str) -> None:
    with Chain(chain.name) as opened:
        made = opened.generations[1].manifest
    assert made is not None
    chain.file(".1.json").write_bytes(dataclasses.replace(made, **changes).to_bytes())  # type: ignore[arg-type]
    for number in 1, 3:
        with pytest.raises(DamagedError, match=said):
            chain.restored(number)


# Parts


@given(st.lists(st.integers(0, 1), max_size=40), st.integers(0, 1), st.data())
def test_stretches_are_the_longest_ones_of_their_kind(flags: list[int], value: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(flags)))
    stop = data.draw(st.none() | st.integers(start, len(flags)))
    expected, place = [], start
    for found, group in itertools.groupby(flags[start:stop]):
        length = len(list(group))
        if found == value:
            expected.append((place, place + length))
        place += length
    assert list(merge.stretches(bytearray(flags), value, start, stop)) == expected


# Chains whose manifests are gone


def test_the_size_of_an_image_is_that_of_its_own_delta(tmp_path: Path) -> None:
    """The third day's delta has no blocks at all."""
    days = chains.image_of("a", "b", "c"), chains.image_of("a", "b", "c", "d", "e*5"), chains.image_of("a", "b", "c")
    chain = chains.new_chain(tmp_path)
    for image in days:
        chain.add(image)
    chains.without_manifests(chain)
    assert [chain.restored(number) for number in (1, 2, 3)] == [*days]


def test_a_delta_of_another_block_size_is_told(chain: SmallChain, tmp_path: Path) -> None:
    chains.without_manifests(chain)
    (tmp_path / "other").mkdir()
    other = chains.three_days(tmp_path / "other", Options(block_size=2 * BLOCK))
    shutil.copy(other.file(".1.gz"), chain.file(".1.gz"))
    said = r"disk\.1\.gz has blocks of 128 bytes, but generation 3, which needs it, of 64"
    with pytest.raises(DamagedError, match=said):
        chain.restored(3)


@pytest.mark.parametrize("change", [-32, 32])
def test_a_table_that_does_not_fit_the_size_of_the_image_is_told(chain: SmallChain, change: int) -> None:
    chains.without_manifests(chain)
    table = chain.file(".3.sha256")
    os.truncate(table, table.stat().st_size + change)
    said = f"has {5 + change // 32} digests, which do not fit an image of {len(DAYS[2])} bytes"
    with pytest.raises(DamagedError, match=said):
        chain.restored(3)


def test_another_table_of_the_same_digests_is_told(chain: SmallChain) -> None:
    """The end of a delta has the SHA-256 of its table: here that is in the other form."""
    chains.without_manifests(chain)
    with Chain(chain.name) as opened, opened.generations[3].open_table() as table:
        digests = table.digests(0, table.count)
    with chain.file(".3.sha256").open("wb", buffering=0) as file:
        writer = TableWriter(file, Hasher(digest_named("sha256"), BLOCK), len(digests) // 32)
        writer.append(digests)
        writer.finish()
    with pytest.raises(DamagedError, match="is not the table that the delta was written with"):
        chain.restored(3)


@pytest.mark.parametrize("words", [("a", "b", "c", "d", "e"), ("0", "0", "0", "0", "x"), ("x", "0", "0", "0", "0")])
@pytest.mark.parametrize("bad", [(0,), (2, 3), (3,)])
def test_the_first_block_that_is_damaged_is_named(tmp_path: Path, words: tuple[str, ...], bad: tuple[int, ...]) -> None:
    chain = chains.new_chain(tmp_path)
    chain.add(chains.image_of(*words))
    chains.without_manifests(chain)
    table = bytearray(chain.file(".1.sha256").read_bytes())
    for block in bad:
        table[4 + 32 * block + 31] ^= 1
    chain.file(".1.sha256").write_bytes(table)
    with pytest.raises(DamagedError, match=f"the block at offset {bad[0] * BLOCK} does not match the digest table"):
        chain.restored(1)


@pytest.mark.parametrize("delta_format", [1, 2])
def test_every_block_is_written_or_made_zero_once(tmp_path: Path, delta_format: int) -> None:
    """A delta of version 1 carries zero blocks among the others, and a device may hold anything before."""
    chain = chains.new_chain(tmp_path)
    chain.add(
        chains.image_of("a", "b", "0", "0", "c", "0", "d*3"), Options(block_size=BLOCK, delta_format=delta_format)
    )
    image = MemoryTarget()
    with Chain(chain.name) as opened:
        assert merge.merge(opened.needed(1), image) == 6 * BLOCK + 3
    done = sorted([*((*each, "data") for each in image.writes), *((*each, "zero") for each in image.zeros)])
    assert done == [(0, 128, "data"), (128, 128, "zero"), (256, 64, "data"), (320, 64, "zero"), (384, 3, "data")]


def test_a_file_of_another_size_than_its_manifest_says_is_told_at_once(chain: SmallChain) -> None:
    with chain.file(".3.gz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedError, match=r"disk\.3\.gz has \d+ bytes instead of \d+"):
        chain.restored(3)


def test_an_image_of_no_bytes_by_the_original_s_commands(tmp_path: Path) -> None:
    chain, empty = chains.new_chain(tmp_path), tmp_path / "empty"
    empty.touch()
    assert commands.run("blockdiff_backup", chain.name, "blockdiff_dump", empty).returncode == 0
    assert chain.restored(1) == b""
