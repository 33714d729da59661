"""What is seen of a source that is read as it is: who uses it, and whether it was written to meanwhile."""

import mmap
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdiff.host.sources import LiveSource, Reading
from blockdiff.host.witness import Witness
from blockdiff.shared import devices
from tests import loop
from tests.descriptors import all_closed

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left_open() -> Iterator[None]:
    with all_closed():
        yield


def seen(path: Path, meanwhile: Callable[[], object] = lambda: None) -> tuple[object, object]:
    """Read a source as a run does, do something meanwhile, and return what was seen."""
    with LiveSource(os.fsencode(path)) as source:
        source.prepare()
        source.take()
        file, _claimed = source.open(Reading())
        file.fill(next(file.pieces(4096)), memoryview(bytearray(2 * MIB)))
        meanwhile()
        found = source.finish()
    return found["touched"], found["how"]


NOTHING = (False, "")
WRITTEN = (True, "was written to while it was read")
UNKNOWN = (None, "does not report whether it was written to")


def number(device: Path) -> str:
    return devices.number(device.stat().st_rdev)


def write(path: Path, offset: int = 1000) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"written")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "backing").write_bytes(b"\x5a" * 4 * MIB)
    with loop.device(tmp_path / "backing") as path:
        yield path


# --- files


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(b"\x5a" * MIB)
    return path


def test_a_file_that_nobody_touches(image: Path) -> None:
    assert seen(image) == NOTHING
    image.read_bytes()
    assert seen(image, image.read_bytes) == NOTHING


def test_a_file_that_is_written_to(image: Path) -> None:
    assert seen(image, lambda: write(image)) == WRITTEN
    assert seen(image) == NOTHING


def test_a_file_whose_mtime_was_put_back(image: Path) -> None:
    before = image.stat()

    def put_back() -> None:
        write(image)
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert seen(image, put_back) == (
        True,
        "was changed (its ctime says so, though its mtime does not) while it was read",
    )


def test_a_file_whose_size_was_put_back(image: Path) -> None:
    before = image.stat()

    def there_and_back() -> None:
        os.truncate(image, before.st_size + 4096)
        os.truncate(image, before.st_size)
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))

    touched, _how = seen(image, there_and_back)
    assert touched is True


def test_what_is_written_before_the_moment_does_not_count(image: Path) -> None:
    with LiveSource(os.fsencode(image)) as source:
        source.prepare()
        write(image, 2 * MIB)
        source.take()
        file, _claimed = source.open(Reading())
        assert file.size == image.stat().st_size
        assert source.finish() == {"touched": False, "how": ""}


def test_a_page_that_was_written_to_before_and_is_again(image: Path) -> None:
    """Through a mapping: the first write to a page sets the times, the next only once that page was on the disk."""
    with image.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5] = 1

        def again() -> None:
            mapped[6] = 2

        assert seen(image, again) == WRITTEN


# --- devices


def test_a_device_that_nobody_touches(device: Path) -> None:
    assert seen(device) == NOTHING


@pytest.mark.parametrize("synced", [False, True])
def test_a_device_that_is_written_to(device: Path, synced: bool) -> None:
    """What is still in memory counts: it was read."""

    def change() -> None:
        with device.open("r+b", buffering=0) as file:
            file.write(b"written")
            if synced:
                os.fsync(file.fileno())

    assert seen(device, change) == WRITTEN
    assert seen(device) == NOTHING


def test_what_was_written_before_and_is_in_memory_does_not_count(device: Path) -> None:
    with device.open("r+b", buffering=0) as file:
        file.write(b"written")
        assert seen(device) == NOTHING


def test_a_device_that_is_discarded(device: Path) -> None:
    def discard() -> None:
        subprocess.run(["blkdiscard", "-f", device], check=True, timeout=60)

    assert seen(device, discard) == WRITTEN


def test_a_device_whose_writes_are_not_counted(device: Path) -> None:
    counting = Path(f"/sys/dev/block/{number(device)}/queue/iostats")
    counting.write_text("0")
    try:
        assert seen(device) == UNKNOWN
    finally:
        counting.write_text("1")


def test_a_device_that_never_counts_anything(device: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As memory disks do not."""
    place = tmp_path / "sys" / "dev" / "block" / number(device)
    place.mkdir(parents=True)
    (place / "stat").write_text(f"{'0 ' * 17}\n")
    monkeypatch.setattr(devices, "SYS", str(tmp_path / "sys"))
    assert seen(device) == UNKNOWN


def test_without_the_kernels_word_nothing_is_known(
    device: Path, image: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "SYS", str(tmp_path / "none"))
    monkeypatch.setattr(devices, "PROC", str(tmp_path / "none"))
    assert seen(device) == UNKNOWN
    assert seen(image) == NOTHING


# --- what lies on them


def test_a_device_that_is_mounted(tmp_path: Path) -> None:
    with loop.mounted(tmp_path / "backing", tmp_path / "a place") as device:
        use = f"is mounted on {tmp_path}/a place"
        os.sync()
        assert seen(device) == (False, use)

        def change() -> None:
            (tmp_path / "a place" / "file").write_bytes(b"x")
            os.sync()

        assert seen(device, change) == (True, f"{use} and was written to while it was read")


def test_a_device_that_is_mounted_read_only(tmp_path: Path) -> None:
    loop.make_file_system(tmp_path / "backing")
    with loop.device(tmp_path / "backing") as device, loop.mount(device, tmp_path / "place", "-o", "ro"):
        assert seen(device) == NOTHING


def test_a_device_that_is_mounted_meanwhile(tmp_path: Path) -> None:
    loop.make_file_system(tmp_path / "backing")
    with loop.device(tmp_path / "backing") as device, LiveSource(os.fsencode(device)) as source:
        source.prepare()
        source.take()
        with loop.mount(device, tmp_path / "place"):
            assert source.finish()["how"] == f"is mounted on {tmp_path}/place and was written to while it was read"


def test_what_is_read_of_a_mounted_device_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    """The file system writes past what is cached of the device, from an earlier reading."""
    mark = b"a line of the file" * 1000
    with loop.mounted(tmp_path / "backing", tmp_path / "place") as device:
        (tmp_path / "place" / "file").write_bytes(mark)
        os.sync()
        offset = (tmp_path / "backing").read_bytes().index(mark)
        device.read_bytes()
        with (tmp_path / "place" / "file").open("r+b") as writer:
            writer.write(mark[::-1])
        os.sync()
        with LiveSource(os.fsencode(device)) as source:
            source.prepare()
            source.take()
            file, _claimed = source.open(Reading())
            image = bytearray()
            for piece in file.pieces(4096):
                image += bytes(piece.length)
                file.fill(piece, memoryview(image)[-piece.length :])
            source.finish()
        assert image[offset : offset + len(mark)] == mark[::-1]


def test_a_device_with_a_partition_that_is_mounted(tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(bytes(5 * MIB))
    with loop.device(tmp_path / "backing") as disk, loop.partition(disk, 2048, 8192) as partition:
        loop.make_file_system(partition)
        assert devices.above(number(disk)) == [number(disk), number(partition)]
        assert seen(disk, lambda: write(partition)) == (
            True,
            f"was written to through {partition.name} while it was read",
        )
        with loop.mount(partition, tmp_path / "place"):
            os.sync()
            assert seen(disk) == (False, f"is mounted on {tmp_path}/place ({partition.name})")
            assert seen(partition) == (False, f"is mounted on {tmp_path}/place")


@pytest.mark.parametrize("kind", ["file", "device"])
def test_a_source_with_a_loop_device_on_it_that_is_mounted(tmp_path: Path, kind: str) -> None:
    loop.make_file_system(tmp_path / "backing")
    with loop.device(tmp_path / "backing") as lower:
        source = lower if kind == "device" else tmp_path / "backing"
        with loop.device(source) as upper:
            assert seen(source) == NOTHING
            with loop.mount(upper, tmp_path / "place"):
                os.sync()
                use = f"is mounted on {tmp_path}/place ({upper.name})"
                assert seen(source) == (False, use)

                def change() -> None:
                    (tmp_path / "place" / "file").write_bytes(b"x")
                    os.sync()

                assert seen(source, change) == (True, f"{use} and was written to while it was read")


# --- what this machine does not have


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Path) -> Path:
    """A place for what the kernel shows, of a machine on which `device` counts its writes."""
    monkeypatch.setattr(devices, "SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(devices, "PROC", str(tmp_path / "proc"))
    monkeypatch.setattr(Witness, "_counts", lambda _self: True)
    stat(tmp_path, number(device))
    (tmp_path / "proc" / "self").mkdir(parents=True)
    return tmp_path


def stat(kernel: Path, device: str, written: int = 7) -> Path:
    """Let a device be there, of which so many sectors were written."""
    place = kernel / "sys" / "dev" / "block" / device
    place.mkdir(parents=True, exist_ok=True)
    (place / "stat").write_text(f"1 0 8 1 1 0 {written} 1 0 1 1 0 0 0 0 0 0\n")
    return place


def test_a_device_that_is_used_as_swap(device: Path, kernel: Path) -> None:
    (kernel / "proc" / "swaps").write_text(f"Filename\tType\tSize\tUsed\tPriority\n{device} partition 100 0 -2\n")
    assert seen(device) == (False, "is used as swap")


def test_a_device_in_which_a_volume_is_mounted(device: Path, kernel: Path) -> None:
    """Nothing but what device-mapper made of it uses it."""
    place = stat(kernel, number(device))
    (place / "holders" / "dm-3").mkdir(parents=True)
    (place / "holders" / "dm-3" / "dev").write_text("252:3\n")
    volume = stat(kernel, "252:3")
    (volume / "dm").mkdir()
    (volume / "dm" / "name").write_text("vg-root\n")
    assert seen(device) == NOTHING
    assert seen(device, lambda: stat(kernel, "252:3", 8)) == (
        True,
        "was written to through vg-root while it was read",
    )
    (kernel / "proc" / "self" / "mountinfo").write_text(
        r"36 35 252:3 / /a\040place rw,relatime shared:1 - ext4 /dev/mapper/vg-root rw" + "\n"
    )
    assert seen(device) == (False, "is mounted on /a place (vg-root)")


def test_a_device_of_a_btrfs_that_is_mounted(device: Path, kernel: Path) -> None:
    """It has a number of its own, and names one of its devices; the kernel knows the others."""
    mountinfo = kernel / "proc" / "self" / "mountinfo"
    mountinfo.write_text(f"36 35 0:45 / /data rw shared:1 - btrfs {device} rw,space_cache\n")
    assert seen(device) == (False, "is mounted on /data")
    mountinfo.write_text("36 35 0:45 / /data rw shared:1 - btrfs /dev/null rw\n")
    assert seen(device) == NOTHING
    with loop.device(kernel / "backing") as other:
        for each in (device, other):
            member = kernel / "sys" / "fs" / "btrfs" / "0af8" / "devices" / each.name
            member.mkdir(parents=True)
            (member / "dev").write_text(f"{number(each)}\n")
        mountinfo.write_text(f"36 35 0:45 / /data rw shared:1 - btrfs {other} rw\n")
        assert seen(device) == (False, "is mounted on /data")


def test_lines_that_mean_nothing_are_passed_over(device: Path, kernel: Path) -> None:
    (kernel / "proc" / "self" / "mountinfo").write_bytes(b"\xff\n36 35 - ext4\n1 2 0:3 / /x rw - proc proc\n\n")
    (kernel / "proc" / "swaps").write_bytes(b"Filename\n\n/none partition\n\\000 file\n/swap\\000 file\n")
    assert seen(device) == NOTHING
