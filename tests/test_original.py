"""`blockdiff_dump` and `blockdiff_merge`, byte for byte like the original's but for what that got wrong."""

import io
import os
import subprocess
import threading
from pathlib import Path

import pytest

from blockdiff.format import codec
from blockdiff.original.apply import apply
from blockdiff.shared.errors import DamagedError
from tests import commands, conftest, loop
from tests.protocol import BLOCK, GOLDEN, IMAGES, dumped, run

NUMBERS = (1, 2, 3, 4)
ENV = {"BLOCKSIZE": str(BLOCK)}


def table_before(number: int) -> Path | None:
    return GOLDEN / f"perl-plain.{number - 1}.md5" if number > 1 else None


# --- blockdiff_dump


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("way", ["file", "standard input", "pipe", "named pipe"])
def test_dump_writes_byte_for_byte_what_the_original_wrote(way: str, number: int, tmp_path: Path) -> None:
    new, image = tmp_path / "new", GOLDEN / f"image.{number}"
    old = table_before(number)
    if way == "file":
        result = run("blockdiff_dump", image, new=new, old=old, env=ENV)
    elif way == "standard input":
        result = run("blockdiff_dump", new=new, old=old, stdin=image, env=ENV)
    elif way == "pipe":
        result = run("blockdiff_dump", new=new, old=old, stdin=image.read_bytes(), env=ENV)
    else:
        os.mkfifo(tmp_path / "fifo")
        writer = threading.Thread(target=(tmp_path / "fifo").write_bytes, args=(image.read_bytes(),))
        writer.start()
        result = run("blockdiff_dump", tmp_path / "fifo", new=new, old=old, env=ENV)
        writer.join(60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (GOLDEN / f"perl-plain.{number}").read_bytes()
    assert new.read_bytes() == (GOLDEN / f"perl-plain.{number}.md5").read_bytes()


def test_what_the_tests_take_for_the_originals_output_is_what_it_wrote() -> None:
    for number in NUMBERS:
        old = table_before(number)
        delta, table = dumped(IMAGES[number - 1], BLOCK, old.read_bytes() if old else None)
        assert delta == (GOLDEN / f"perl-plain.{number}").read_bytes()
        assert table == (GOLDEN / f"perl-plain.{number}.md5").read_bytes()


def test_dump_reads_the_old_table_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "old")
    table = (GOLDEN / "perl-plain.1.md5").read_bytes()
    writer = threading.Thread(target=(tmp_path / "old").write_bytes, args=(table,))
    writer.start()
    result = run("blockdiff_dump", GOLDEN / "image.2", new=tmp_path / "new", old=tmp_path / "old")
    writer.join(60)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (GOLDEN / "perl-plain.2").read_bytes()


@pytest.mark.parametrize("as_file", [True, False])
def test_dump_of_an_empty_image_is_a_block_size_and_no_blocks(as_file: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    arguments = [tmp_path / "empty"] if as_file else []
    result = run("blockdiff_dump", *arguments, new=tmp_path / "new", env=ENV)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == (tmp_path / "new").read_bytes() == BLOCK.to_bytes(4, "little")


@pytest.mark.parametrize(
    ("arguments", "environment", "with_old", "block_size"),
    [
        ([], {}, False, 16384),
        ([], {"BLOCKSIZE": ""}, False, 16384),
        ([], {"BLOCKSIZE": "1000"}, False, 1000),
        (["--blocksize=700"], {"BLOCKSIZE": "1000"}, False, 700),
        (["--blocksize", "700"], {}, False, 700),
        (["--blocksize=700"], {"BLOCKSIZE": "1000"}, True, BLOCK),
    ],
)
def test_dump_takes_its_block_size_from_the_old_table_or_the_option_or_the_environment(
    arguments: list[str], environment: dict[str, str], with_old: bool, block_size: int, tmp_path: Path
) -> None:
    old = GOLDEN / "perl-plain.1.md5" if with_old else None
    result = run("blockdiff_dump", *arguments, GOLDEN / "image.2", new=tmp_path / "new", old=old, env=environment)
    assert (result.returncode, result.stderr) == (0, b"")
    expected = dumped(IMAGES[1], block_size, old.read_bytes() if old else None)
    assert (result.stdout, (tmp_path / "new").read_bytes()) == expected


@pytest.mark.parametrize("option", ["-z", "--gzip", "--lzop"])
def test_dump_compresses_what_it_would_have_written_plainly(option: str, tmp_path: Path) -> None:
    program = "lzop" if option == "--lzop" else "gzip"
    conftest.require_program(program)
    result = run(
        "blockdiff_dump", option, GOLDEN / "image.2", new=tmp_path / "new", old=GOLDEN / "perl-plain.1.md5", env=ENV
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert unpacked(program, result.stdout) == (GOLDEN / "perl-plain.2").read_bytes()
    assert (tmp_path / "new").read_bytes() == (GOLDEN / "perl-plain.2.md5").read_bytes()


def unpacked(program: str, data: bytes) -> bytes:
    return subprocess.run([program, "-dc"], input=data, stdout=subprocess.PIPE, check=True, timeout=60).stdout


def test_dump_of_many_batches_is_still_what_the_original_writes(tmp_path: Path) -> None:
    """Changed, unchanged, zero and new blocks over several batches and members, and a short tail."""
    image = bytearray(b"".join(i.to_bytes(4, "little") for i in range(1 << 20)) + bytes(3 << 20) + b"tail")
    (tmp_path / "old").write_bytes(dumped(bytes(image[: 6 << 20]), 4096)[1])
    image[100_000:200_000] = b"x" * 100_000
    image[1 << 20 : 3 << 20] = bytes(2 << 20)
    (tmp_path / "image").write_bytes(image)
    result = run("blockdiff_dump", tmp_path / "image", new=tmp_path / "new", old=tmp_path / "old")
    assert (result.returncode, result.stderr) == (0, b"")
    expected = dumped(bytes(image), 4096, (tmp_path / "old").read_bytes())
    assert (result.stdout, (tmp_path / "new").read_bytes()) == expected


def stack_end() -> int:
    """Return where the stack of this process ends: nothing is mapped behind it."""
    (line,) = (line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[stack]"))
    return int(line.split()[0].split("-")[1], 16)


def test_dump_fails_at_a_read_error_and_names_the_offset(tmp_path: Path) -> None:
    """The original took it for the end of the image. Reading a process's memory fails where nothing is mapped."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        memory.seek(stack_end() - 3 * 4096)
        result = subprocess.run(
            ["sh", "-c", 'exec blockdiff_dump 6>"$1"', "sh", tmp_path / "new"],
            stdin=memory,
            env={**os.environ, "PATH": commands.PATH},
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert result.returncode == 1
    assert b"cannot read the input at offset 12288: Input/output error" in result.stderr


def test_dump_fails_at_a_read_error_of_a_named_file(tmp_path: Path) -> None:
    result = run("blockdiff_dump", "/proc/self/mem", new=tmp_path / "new")
    assert result.returncode == 1
    assert b"at offset 0: Input/output error" in result.stderr


def test_dump_needs_descriptor_6(tmp_path: Path) -> None:
    result = run("blockdiff_dump", GOLDEN / "image.1", new=None)
    assert (result.returncode, result.stdout) == (2, b"")
    assert b"descriptor 6 is not open for writing: the new digest table has no output" in result.stderr
    assert b"add 6> NAME.md5" in result.stderr


@pytest.mark.parametrize(("path", "words"), [("missing", b"No such file or directory"), ("", b"is a directory")])
def test_dump_says_what_is_wrong_with_file(path: str, words: bytes, tmp_path: Path) -> None:
    result = run("blockdiff_dump", tmp_path / path, new=tmp_path / "new")
    assert (result.returncode, result.stdout) == (1, b"")
    assert str(tmp_path / path).encode() in result.stderr
    assert words in result.stderr


@pytest.mark.parametrize(
    "table",
    [b"", b"\0\2\0", b"\0\2\0\0" + bytes(15), bytes(4), b"\1\0\x40\0" + bytes(16)],
    ids=["empty", "cut header", "cut digest", "block size 0", "block size 4 MiB + 1"],
)
def test_dump_refuses_a_damaged_old_table(table: bytes, tmp_path: Path) -> None:
    (tmp_path / "old").write_bytes(table)
    result = run("blockdiff_dump", GOLDEN / "image.1", new=tmp_path / "new", old=tmp_path / "old")
    assert (result.returncode, result.stdout) == (5, b"")
    assert b"the digest table on descriptor 5 is damaged" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--blocksize=0"], {}, b"the block size 0 is not between 1 and 4194304"),
        (["--blocksize=4194305"], {}, b"the block size 4194305 is not between 1 and 4194304"),
        ([], {"BLOCKSIZE": "16K"}, b"BLOCKSIZE is '16K', not a number of bytes"),
        (["-z", "--lzop"], {}, b"cannot be compressed by both"),
        (["--blocksize=many"], {}, b"many"),
        (["one", "two"], {}, b"two"),
        (["--no-such-option"], {}, b"--no-such-option"),
    ],
)
def test_dump_refuses_wrong_usage(
    arguments: list[str], environment: dict[str, str], words: bytes, tmp_path: Path
) -> None:
    result = run("blockdiff_dump", *arguments, new=tmp_path / "new", stdin=b"image", env=environment)
    assert (result.returncode, result.stdout) == (2, b"")
    assert words in result.stderr


@pytest.mark.parametrize("full", ["delta", "digest table"])
def test_dump_fails_where_its_output_cannot_be_written(full: str, tmp_path: Path) -> None:
    new = Path("/dev/full") if full == "digest table" else tmp_path / "new"
    out = Path("/dev/full") if full == "delta" else None
    result = run("blockdiff_dump", GOLDEN / "image.1", new=new, stdout=out)
    assert result.returncode == 1
    assert f"cannot write the {'new ' if full == 'digest table' else ''}{full} (descriptor".encode() in result.stderr
    assert b"No space left on device" in result.stderr


# --- blockdiff_merge


@pytest.mark.parametrize(
    ("chain", "suffix"),
    [
        ("perl-plain", ""),
        ("perl-gzip", ".gz"),
        ("perl-lzop", ".lzop"),
        ("own-none", ""),
        ("own-gzip", ".gz"),
        ("own-zstd", ".zst"),
    ],
)
def test_merge_takes_deltas_of_either_version_in_any_compression_in_place(
    chain: str, suffix: str, tmp_path: Path
) -> None:
    """Of version 1 the size of a shrunken image must be given by hand, as ever."""
    if suffix == ".lzop":
        conftest.require_program("lzop")
    target = tmp_path / "restored"
    for number in NUMBERS:
        image = IMAGES[number - 1]
        if chain.startswith("perl") and number > 1 and target.stat().st_size > len(image):
            os.truncate(target, len(image))
        result = commands.run("blockdiff_merge", target, stdin=(GOLDEN / f"{chain}.{number}{suffix}").read_bytes())
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        assert target.read_bytes() == image


def test_merge_makes_zero_runs_holes_of_a_new_file(tmp_path: Path) -> None:
    image = b"begin" + bytes(8 << 20) + b"end"
    (tmp_path / "source").write_bytes(image)
    (tmp_path / "backup").mkdir()
    commands.done("blockdiff", "backup", tmp_path / "backup" / "name", tmp_path / "source")
    target = tmp_path / "restored"
    delta = (tmp_path / "backup" / "name.1.gz").read_bytes()
    assert commands.run("blockdiff_merge", target, stdin=delta).returncode == 0
    assert target.read_bytes() == image
    assert target.stat().st_blocks * 512 < 1 << 20


def test_merge_overwrites_with_zeros_what_a_file_holds(tmp_path: Path) -> None:
    target = tmp_path / "restored"
    target.write_bytes(b"x" * 9999)
    assert commands.run("blockdiff_merge", target, stdin=(GOLDEN / "own-none.1").read_bytes()).returncode == 0
    assert target.read_bytes() == IMAGES[0]


@pytest.mark.parametrize("name", ["own-none.2", "own-gzip.2.gz", "own-zstd.2.zst", "perl-gzip.2.gz"])
def test_merge_refuses_a_delta_that_is_cut_anywhere(name: str, tmp_path: Path) -> None:
    delta = (GOLDEN / name).read_bytes()
    for length in range(len(delta)):
        target = tmp_path / "restored"
        target.write_bytes(IMAGES[0])
        with pytest.raises(DamagedError, match=r"cut off|ends in the middle"):
            apply(codec.decompressed(io.BytesIO(delta[:length]), "the delta"), str(target))


def test_merge_refuses_a_plain_delta_of_version_1_that_is_cut_within_a_records_head(tmp_path: Path) -> None:
    """More than that its format cannot tell: a delta may end behind any record, and the last one may be short."""
    delta = (GOLDEN / "perl-plain.1").read_bytes()
    for length in range(len(delta)):
        target = tmp_path / "restored"
        target.unlink(missing_ok=True)
        place = (length - 4) % (8 + BLOCK)  # within a record of 8 bytes and a block
        if length < 4 or 1 <= place <= 8:
            with pytest.raises(DamagedError, match="ends in the middle"):
                apply([delta[:length]], str(target))
        elif length % 7 == 0:  # each is written durably: a seventh of them is enough
            apply([delta[:length]], str(target))
            assert target.read_bytes() == IMAGES[0][: target.stat().st_size]


def test_merge_refuses_a_short_block_of_version_1_in_the_middle_of_a_file(tmp_path: Path) -> None:
    target = tmp_path / "restored"
    target.write_bytes(IMAGES[1])
    result = commands.run("blockdiff_merge", target, stdin=(GOLDEN / "perl-plain.3").read_bytes())
    assert result.returncode == 5
    assert b"the image shrank (then truncate -s 1800 first)" in result.stderr


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (b"", b"it ends in the middle of its header"),
        (b"\0\0\0\0junk and more junk", b"it is not a delta"),
        (b"\x1f\x8b\x08\x00junk and more", b"Invalid deflate block"),
        (b"\x28\xb5\x2f\xfdjunk and more", b"the delta on standard input is damaged"),
        (b"\x89LZO\0\r\n\x1a\njunk", b"lzop exited with status"),
    ],
)
def test_merge_does_not_touch_the_file_for_what_is_no_delta(delta: bytes, words: bytes, tmp_path: Path) -> None:
    if b"LZO" in delta:
        conftest.require_program("lzop")
    result = commands.run("blockdiff_merge", tmp_path / "restored", stdin=delta)
    assert result.returncode == 5
    assert words in result.stderr
    assert not (tmp_path / "restored").exists()


def test_merge_says_that_the_file_is_not_to_be_trusted_after_a_malformed_delta(tmp_path: Path) -> None:
    delta = b"\4\0\0\0" + bytes(8) + b"abcd" + b"\6\0\0\0\0\0\0\0" + b"abcd"
    result = commands.run("blockdiff_merge", tmp_path / "restored", stdin=delta)
    assert result.returncode == 5
    assert b"is damaged: a record has the offset 6" in result.stderr
    assert b"restored cannot be trusted now" in result.stderr
    assert b"start again with the deltas from the first one on" in result.stderr


@pytest.mark.parametrize(
    ("path", "words"), [("missing/restored", b"No such file or directory"), ("", b"Is a directory")]
)
def test_merge_says_what_is_wrong_with_its_target(path: str, words: bytes, tmp_path: Path) -> None:
    result = commands.run("blockdiff_merge", tmp_path / path, stdin=(GOLDEN / "perl-plain.1").read_bytes())
    assert result.returncode == 1
    assert str(tmp_path / path).rstrip("/").encode() in result.stderr
    assert words in result.stderr


def test_merge_fails_where_its_target_cannot_be_written(tmp_path: Path) -> None:
    result = commands.run("blockdiff_merge", "/dev/full", stdin=(GOLDEN / "perl-plain.1").read_bytes())
    assert result.returncode == 1
    assert b"/dev/full" in result.stderr


def test_merge_needs_a_file_name() -> None:
    assert commands.run("blockdiff_merge").returncode == 2


def test_merge_writes_to_a_device_and_leaves_alone_what_lies_behind_the_image(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * 8192)
    with loop.device(backing) as device:
        for number in (1, 2):
            delta = (GOLDEN / f"own-gzip.{number}.gz").read_bytes()
            result = commands.run("blockdiff_merge", device, stdin=delta)
            assert (result.returncode, result.stderr) == (0, b"")
    assert backing.read_bytes() == IMAGES[1] + b"x" * (8192 - len(IMAGES[1]))


def test_merge_refuses_a_device_that_is_in_use(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(b"x" * 8192)
    with loop.device(backing) as device:
        user = os.open(device, os.O_RDWR | os.O_EXCL)
        try:
            result = commands.run("blockdiff_merge", device, stdin=(GOLDEN / "own-none.1").read_bytes())
        finally:
            os.close(user)
    assert result.returncode == 1
    assert f"{device} is in use: " in result.stderr.decode() and b"has it open" in result.stderr
    assert backing.read_bytes() == b"x" * 8192


def test_merge_fails_where_a_device_is_too_small(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1024))
    with loop.device(backing) as device:
        result = commands.run("blockdiff_merge", device, stdin=(GOLDEN / "own-none.1").read_bytes())
    assert result.returncode == 1
    assert b"No space left on device" in result.stderr
    assert b"cannot be trusted" in result.stderr


# --- all of them


@pytest.mark.parametrize("program", ["blockdiff_dump", "blockdiff_merge", "blockdiff_backup", "ssh_blockdiff_dump"])
def test_the_commands_tell_their_version_and_usage(program: str) -> None:
    assert commands.done(program, "--version").strip()
    assert b"Usage: " + program.encode() in commands.done(program, "--help")
