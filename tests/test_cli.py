"""The `blockdiff` command as its users meet it: words, exit statuses, options, sources, terminals and signals."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.progress import Progress
from blockdiff.shared.errors import ChainError, SourceError
from tests import chains, commands, loop, mounts, processes, terminal
from tests.chains import BLOCK, DAYS, SmallChain

KIB = 1 << 10


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.new_chain(tmp_path)


def refused(status: int, *arguments: str | bytes | Path) -> str:
    """Return what a command says that exits with `status`; nothing is printed on standard output then."""
    result = commands.run("blockdiff", *arguments)
    assert (result.returncode, result.stdout) == (status, b""), result
    assert b"Traceback" not in result.stderr
    return result.stderr.decode()


# Sources


def test_a_source_that_cannot_be_backed_up_is_named(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    assert f"cannot open {tmp_path}/none: No such file" in refused(1, "backup", chain.name, tmp_path / "none")
    assert f"{tmp_path} is a directory" in refused(1, "backup", chain.name, tmp_path)
    assert f"{tmp_path}/empty is empty" in refused(1, "backup", chain.name, tmp_path / "empty")
    assert "neither a regular file nor a block device" in refused(1, "backup", chain.name, tmp_path / "fifo")
    assert f"cannot open {tmp_path}/loop: " in refused(1, "backup", chain.name, tmp_path / "loop")
    assert chain.files() == {}


@pytest.mark.parametrize("words", ["{name}", "./{name}", "../{directory}/{name}"])
def test_a_relative_source_is_bound_to_its_absolute_path(chain: SmallChain, words: str) -> None:
    chain.source.write_bytes(b"x" * 1000)
    here = chain.source.parent
    source = words.format(name=chain.source.name, directory=here.name)
    commands.done("blockdiff", "backup", chain.name, source, cwd=here)
    (made,) = here.rglob("*.1.json")
    assert json.loads(made.read_bytes())["source"]["path"] == str(here.resolve() / chain.source.name)
    commands.done("blockdiff", "backup", chain.name, chain.source.resolve())
    assert chain.last() == 2


def test_name_and_source_in_the_wrong_order_or_place_are_refused(chain: SmallChain, tmp_path: Path) -> None:
    for name in ("root@web1:/dev/vg/lv", "ssh://web1/dev/vg/lv"):
        said = refused(2, "backup", name, chain.name)
        assert f"{name} is in the place of NAME, but is a source" in said
        assert "NAME comes first: blockdiff backup NAME SOURCE" in said
    said = refused(2, "backup", chain.name, "web1")
    assert "cannot understand the source web1: there is no such file here" in said
    assert "the path on the host must begin with /" in refused(2, "backup", chain.name, "web1:images/x")
    (tmp_path / "backups").mkdir()
    said = refused(2, "backup", tmp_path / "backups", "/dev/null")
    assert f"{tmp_path}/backups is a directory, not the NAME of a chain" in said
    assert chain.files() == {}


@pytest.mark.parametrize("size", [1, 63, 64, 65, 4096, 100_001])
def test_a_source_of_any_size_grows_and_shrinks(chain: SmallChain, size: int) -> None:
    image = random.Random(size).randbytes(size)
    chain.add(image)
    chain.add(image + b"grown")
    chain.add(image[: size // 2 + 1])
    chain.add(bytes(size))
    chain.add(image[:1])
    chain.assert_sound()


def test_a_sparse_source_of_a_gigabyte_is_stored_small(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    with chain.source.open("wb") as file:
        file.write(b"begin")
        file.seek(700 << 20)
        file.write(b"middle")
        file.truncate((1 << 30) + 1)
    commands.done("blockdiff", "backup", chain.name, chain.source)
    assert chain.file(".1.gz").stat().st_size < 8 * KIB
    commands.done("blockdiff", "verify", chain.name)
    commands.done("blockdiff", "restore", chain.name, large_tmp_path / "out")
    assert (large_tmp_path / "out").stat().st_size == (1 << 30) + 1
    assert (large_tmp_path / "out").stat().st_blocks * 512 < 1 << 20
    subprocess.run(["cmp", chain.source, large_tmp_path / "out"], check=True, timeout=60)


def test_a_block_device_is_a_source(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    backing = large_tmp_path / "backing"
    backing.write_bytes(random.Random(1).randbytes(300 * KIB))
    with loop.device(backing) as device:
        commands.done("blockdiff", "backup", chain.name, device)
        with device.open("r+b") as file:
            file.seek(200 * KIB)
            file.write(b"changed")
        summary = json.loads(commands.done("blockdiff", "backup", "--json", chain.name, device))
        content = device.read_bytes()
    assert summary["source"]["kind"] == "device" and summary["consistency"] == "still"
    assert summary["changed_blocks"] == 1 and summary["image_size"] == 300 * KIB
    assert chain.restored(2) == content
    commands.done("blockdiff", "verify", chain.name)


#: More than the buffers and the pipe between agent and server hold: the agent cannot come to its end by itself.
MUCH = 64 << 20


class _Touch(Progress):
    """Changes the length of the source while it is read, by `change` bytes."""

    def __init__(self, source: Path, change: int = 0) -> None:
        self._source = source
        self._change = change

    def begin(self, total: int | None) -> None:
        assert total is not None
        os.truncate(self._source, total + self._change)
        os.utime(self._source, (1, 1))


def test_a_source_that_is_written_to_during_the_run_gives_a_warning(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.source.write_bytes(random.Random(1).randbytes(MUCH))
    result = chain.add(options=Options(), progress=_Touch(chain.source))
    assert result.manifest.consistency == "changing"
    assert len(result.warnings) == 1 and "was written to while it was read" in result.warnings[0]
    assert chain.add(options=Options()).manifest.consistency == "still"
    chain.assert_sound()


def test_the_warning_is_printed_and_the_command_exits_3(chain: SmallChain) -> None:
    chain.source.write_bytes(random.Random(1).randbytes(256 * KIB))
    with commands.started("blockdiff", "backup", "--bwlimit", "64K", chain.name, chain.source) as process:
        stamp = 0
        while process.poll() is None:
            stamp += 1
            os.utime(chain.source, (stamp, stamp))
            time.sleep(0.005)
        assert process.stdout is not None and process.stderr is not None
        assert (process.returncode, process.stdout.read()) == (3, b"")
        message = process.stderr.read().decode()
    assert message.startswith(f"blockdiff: warning: {chain.source} was written to while it was read")
    assert chain.restored() == chain.source.read_bytes()


def test_a_source_that_shrinks_during_the_run_fails_it(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.add(DAYS[0])
    before = chain.files()
    chain.source.write_bytes(random.Random(1).randbytes(MUCH))
    with pytest.raises(SourceError, match=f"shrank from {MUCH} to {MUCH - 1} bytes while it was read"):
        chain.add(options=Options(full=True), progress=_Touch(chain.source, -1))
    assert chain.files() == before


def test_another_source_under_an_existing_name_needs_full(chain: SmallChain, tmp_path: Path) -> None:
    chain.add(DAYS[0])
    before = chain.files()
    other = tmp_path / "other"
    other.write_bytes(DAYS[1])
    message = refused(1, "backup", chain.name, other)
    assert f"{chain.name} holds backups of {chain.source}, not of {other}" in message and "--full" in message
    assert chain.files() == before
    commands.done("blockdiff", "backup", "--full", chain.name, other)
    commands.done("blockdiff", "backup", chain.name, other)
    assert "holds backups of" in refused(1, "backup", chain.name, chain.source)
    assert chain.restored(3) == DAYS[1] and chain.bad() == []


def test_a_lost_manifest_does_not_let_another_source_in(chain: SmallChain, tmp_path: Path) -> None:
    """In format 1 a generation without manifest may be the original's; an older manifest still tells the source."""
    for image in DAYS:
        chain.add(image, Options(block_size=BLOCK, delta_format=1))
    chain.file(".3.json").unlink()
    (tmp_path / "other").write_bytes(DAYS[0])
    other = SmallChain(chain.directory, tmp_path / "other")
    with pytest.raises(ChainError, match="holds backups of"):
        other.add()


# Names and paths


@pytest.mark.parametrize(
    "word",
    [
        b"two words",
        b"it's",
        b'say "x"',
        b"$(touch x)`touch x`",
        b"new\nline",
        b"-rf",
        b"\xff\xfe\x80",
        b"\xe2\x82\xac",
        b"*?[a]",
    ],
)
def test_names_of_any_bytes_are_taken_as_they_are(tmp_path: Path, word: bytes) -> None:
    """In NAME, in the path of the source and in that of the target; nothing of it reaches a shell."""
    place = os.fsencode(tmp_path) + b"/in " + word
    os.mkdir(place)
    source, name, out = place + b"/s" + word, place + b"/" + word, os.fsencode(tmp_path) + b"/" + word
    Path(os.fsdecode(source)).write_bytes(DAYS[0])
    commands.done("blockdiff", "backup", b"--", name, source)
    Path(os.fsdecode(source)).write_bytes(DAYS[1])
    summary = json.loads(commands.done("blockdiff", "backup", "--json", b"--", name, source))
    assert os.fsencode(summary["source"]["path"]) == source
    commands.done("blockdiff", "list", b"--", name)
    commands.done("blockdiff", "verify", b"--", name + b"@2")
    commands.done("blockdiff", "restore", b"--", name + b"@1", out)
    commands.done("blockdiff", "restore", b"--", name, out + b"2")
    assert Path(os.fsdecode(out)).read_bytes() == DAYS[0]
    assert Path(os.fsdecode(out + b"2")).read_bytes() == DAYS[1]
    assert not list(tmp_path.rglob("x"))


def test_a_relative_name_with_a_leading_dash_is_a_name(chain: SmallChain) -> None:
    chain.source.write_bytes(DAYS[0])
    commands.done("blockdiff", "backup", "--", "-name", chain.source, cwd=chain.directory)
    assert (chain.directory / "-name.1.json").exists()


def test_what_a_name_says_never_reaches_the_terminal_as_it_is(chain: SmallChain) -> None:
    message = refused(1, "verify", f"{chain.name}\33[2J\nblockdiff: all is well")
    assert "\33" not in message and message.count("\n") == 2 and r"\x1b[2J\nblockdiff" in message


# Options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--block-size", "0"], "is not a size"),
        (["--block-size", "-5"], "is not a size"),
        (["--block-size", "5X"], "is not a size"),
        (["--block-size", "1.5K"], "is not a size"),
        (["--block-size", ""], "is not a size"),
        (["--block-size", "5M"], "the block size 5242880 is not between 1 and 4194304 bytes"),
        (["--digest", "crc32"], "'crc32' is not one of"),
        (["--compression", "lzop"], "'lzop' is not one of"),
        (["--level", "0"], "gzip has no level 0"),
        (["--level", "10"], "gzip has no level 10"),
        (["--compression", "zstd", "--level", "20"], "zstd has no level 20"),
        (["--compression", "none", "--level", "1"], "none has no level 1"),
        (["--format", "3"], "'3' is not one of"),
        (["--chain", "yearly"], "'yearly' is not one of"),
        (["--bwlimit", "fast"], "is not a size"),
        (["--nonsense"], "No such option"),
    ],
)
def test_a_wrong_option_exits_2_and_makes_nothing(chain: SmallChain, options: list[str], words: str) -> None:
    chain.source.write_bytes(DAYS[0])
    assert words in refused(2, "backup", *options, chain.name, chain.source)
    assert chain.files() == {}


@pytest.mark.parametrize("arguments", [["backup"], ["backup", "x"], ["restore", "x"], ["nonsense"], ["list"]])
def test_missing_words_exit_2(arguments: list[str]) -> None:
    assert "Usage" in refused(2, *arguments)


def test_a_source_that_is_none_and_a_name_that_is_none_exit_2(chain: SmallChain) -> None:
    assert "cannot understand the source relative/path" in refused(2, "backup", chain.name, "relative/path")
    assert "cannot end like" in refused(2, "backup", f"{chain.name}@3", "/dev/null")
    assert "is not a NAME for a chain" in refused(2, "verify", f"{chain.directory}/")


@pytest.mark.parametrize(
    ("size", "bytes_"), [("1", 1), ("100", 100), ("4k", 4096), ("4KiB", 4096), ("2KB", 2048), ("1M", 1 << 20)]
)
def test_block_sizes_have_suffixes(chain: SmallChain, size: str, bytes_: int) -> None:
    chain.source.write_bytes(DAYS[0])
    summary = json.loads(commands.done("blockdiff", "backup", "--json", "--block-size", size, chain.name, chain.source))
    assert summary["block_size"] == bytes_
    assert chain.restored() == DAYS[0]


def test_the_defaults_are_those_of_the_help(chain: SmallChain) -> None:
    chain.source.write_bytes(DAYS[0])
    summary = json.loads(commands.done("blockdiff", "backup", "--json", chain.name, chain.source))
    assert (summary["block_size"], summary["digest"], summary["delta_format"]) == (64 * KIB, "sha256", 2)
    assert summary["delta"]["suffix"] == ".gz"


@pytest.mark.parametrize("digest", ["sha256", "blake2b", "xxh3", "md5"])
@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_every_digest_and_compression_makes_a_chain(chain: SmallChain, digest: str, compression: str) -> None:
    for image in DAYS:
        chain.add(image, Options(block_size=BLOCK, digest=digest, compression=compression))
    suffix = {"gzip": ".gz", "zstd": ".zst", "none": ""}[compression]
    assert chain.file(f".3.{digest}").exists() and chain.file(f".3{suffix}").exists()
    chain.assert_sound()


@pytest.mark.parametrize(("compression", "levels"), [("gzip", [1, 2, 3, 4, 9]), ("zstd", [1, 3, 19])])
def test_levels_make_sound_generations_in_one_chain(chain: SmallChain, compression: str, levels: list[int]) -> None:
    for level in levels:
        chain.add(b"%d" % level * 5000, Options(block_size=1000, compression=compression, level=level))
    chain.assert_sound()


def test_a_chain_keeps_its_block_size_digest_and_format_until_full(chain: SmallChain) -> None:
    chain.add(DAYS[0], Options(block_size=BLOCK, digest="md5", delta_format=1))
    other = Options(block_size=128, digest="blake2b", delta_format=2, compression="zstd")
    result = chain.add(DAYS[1], other)
    made = result.manifest
    assert (made.block_size, made.digest, made.delta_format, made.delta.suffix) == (BLOCK, "md5", 1, ".zst")
    assert result.planned == [
        "the chain keeps its block size 64 (asked for: 128; --full would change it)",
        "the chain keeps its digest md5 (asked for: blake2b; --full would change it)",
        "the chain keeps its format 1 (asked for: 2; --full would change it)",
    ]
    plain = chain.add(DAYS[2], Options(full=True)).manifest
    assert (plain.block_size, plain.digest, plain.delta_format, plain.full) == (BLOCK, "md5", 1, True)
    changed = chain.add(DAYS[0], Options(block_size=128, digest="blake2b", delta_format=2, full=True)).manifest
    assert (changed.block_size, changed.digest, changed.delta_format, changed.full) == (128, "blake2b", 2, True)
    following = chain.add(DAYS[1]).manifest
    assert (following.block_size, following.digest, following.full) == (128, "blake2b", False)
    chain.assert_sound()


@pytest.mark.parametrize(("period", "form"), [("monthly", "-%Y%m"), ("weekly", "-%GW%V"), ("daily", "-%Y%m%d")])
def test_a_period_begins_a_chain_of_its_own(chain: SmallChain, period: str, form: str) -> None:
    chain.source.write_bytes(DAYS[0])
    before = datetime.now()
    for _ in range(2):
        summary = json.loads(
            commands.done("blockdiff", "backup", "--json", "--chain", period, chain.name, chain.source)
        )
    names = {chain.name + when.strftime(form) for when in (before, datetime.now())}
    assert summary["name"] in names
    if len(names) == 1:  # no midnight in between
        assert summary["generation"] == 2
    assert re.fullmatch(r"disk-(\d{6}|\d{4}W\d{2}|\d{8})", Path(summary["name"]).name)


# Output


def test_json_is_one_object_that_tells_what_was_made(chain: SmallChain) -> None:
    chain.add(DAYS[0])
    chain.source.write_bytes(DAYS[1])
    summary = json.loads(commands.done("blockdiff", "backup", "--json", chain.name, chain.source))
    expected = {"name": chain.name, "generation": 2, "full": False, "image_size": len(DAYS[1]), "blocks": 7}
    assert expected.items() <= summary.items()
    assert (summary["changed_blocks"], summary["consistency"], summary["warnings"]) == (3, "still", [])
    assert summary["parent"]["generation"] == 1 and summary["source"]["path"] == str(chain.source)
    assert summary["delta"]["size"] == chain.file(".2.gz").stat().st_size


def test_success_is_silent_without_a_terminal(chain: SmallChain, tmp_path: Path) -> None:
    chain.source.write_bytes(DAYS[0])
    assert commands.done("blockdiff", "backup", chain.name, chain.source) == b""
    assert commands.done("blockdiff", "verify", chain.name) == b""
    assert commands.done("blockdiff", "restore", chain.name, tmp_path / "out") == b""


def test_a_terminal_gets_a_progress_bar_and_a_summary(large_tmp_path: Path) -> None:
    chain = chains.new_chain(large_tmp_path)
    chain.source.write_bytes(random.Random(1).randbytes(24 << 20))
    status, shown = terminal.run("blockdiff", "backup", "--bwlimit", "4M", chain.name, chain.source)
    assert status == 0
    # bytes read of all, and bytes sent, on the way
    assert re.search(r"(?<![0-9.])(?!24 )([0-9]+(?:\.[0-9])?) MiB of 24 MiB[^\r\n]* \1 MiB sent", shown)
    assert re.search(r"[0-9] MiB/s", shown) and re.search(r"0:00:0[0-9]", shown)  # rate and time left
    assert "generation 1: full, 24 MiB stored" in shown
    status, shown = terminal.run("blockdiff", "backup", "--block-size", "4K", chain.name, chain.source)
    assert status == 0 and "generation 2: 0 of 384 blocks changed" in shown
    assert "note: the chain keeps its block size 65536 (asked for: 4096; --full would change it)" in shown
    status, shown = terminal.run("blockdiff", "verify", chain.name)
    assert status == 0 and "generation 1: ok" in shown and "generation 2: ok" in shown
    status, shown = terminal.run("blockdiff", "restore", chain.name, large_tmp_path / "out")
    assert status == 0 and (large_tmp_path / "out").read_bytes() == chain.source.read_bytes()


def test_help_and_version() -> None:
    shown = " ".join(commands.done("blockdiff", "--help").decode().split())
    assert "0 done, 1 failed, 2 usage, 3 done with a warning, 4 chain is busy, 5 backup data damaged" in shown
    assert commands.done("blockdiff", "--version").startswith(b"blockdiff ")
    assert b"--block-size" in commands.done("blockdiff", "backup", "-h")


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_in_the_middle_leaves_the_chain_as_it_was(chain: SmallChain, number: signal.Signals) -> None:
    chain.add(DAYS[0])
    before = chain.files()
    chain.source.write_bytes(random.Random(1).randbytes(1 << 20))
    mark = processes.new_mark()
    with commands.started(
        "blockdiff", "backup", "--bwlimit", "1", chain.name, chain.source, env=processes.environment(mark)
    ) as process:
        deadline = time.monotonic() + 60
        while not (chain.directory / ".disk.2.gz.tmp").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr is not None
        message = process.stderr.read().decode()
    assert message == f"blockdiff: stopped by {number.name}\n"
    assert chain.files() == before
    processes.wait_until_gone(mark)
    chain.assert_sound()


def test_a_signal_while_an_error_is_told_changes_nothing() -> None:
    script = (
        "import os, signal, sys\n"
        "from blockdiff.cli import outcome\n"
        "from blockdiff.cli.modern import main\n"
        "say_error = outcome.say_error\n"
        "def say(*arguments):\n"
        "    for number in signal.SIGTERM, signal.SIGHUP, signal.SIGINT: os.kill(os.getpid(), number)\n"
        "    say_error(*arguments)\n"
        "outcome.say_error = say\n"
        "sys.argv[1:] = ['restore', 'disk@0', 'out']\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done
    assert done.stderr.startswith("blockdiff: ") and "Traceback" not in done.stderr, done


def test_a_signal_in_a_restore_leaves_no_file(large_tmp_path: Path) -> None:
    """The signal comes as soon as there is a file: one that came before it was written to is removed as well."""
    chain = chains.new_chain(large_tmp_path)
    chain.add(random.Random(1).randbytes(64 << 20), Options(compression="none"))
    with mounts.tmpfs(large_tmp_path / "target") as place:
        with commands.started("blockdiff", "restore", chain.name, place / "out") as process:
            deadline = time.monotonic() + 60
            while not list(place.iterdir()) and process.poll() is None:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGTERM)
            status = process.wait(60)
        names = [path.name for path in place.iterdir()]
    assert (status, names) in ((128 + signal.SIGTERM, []), (0, ["out"]))
