"""Backups of sources that are read as they are: what the user is told of those in use, and how they are held still."""

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.progress import Progress
from tests import chains, commands, loop, processes
from tests.chains import SmallChain
from tests.conftest import require_program
from tests.descriptors import all_closed

KIB = 1 << 10
NOISE = random.Random(3).randbytes(300 * KIB)
LIMIT_S = 30.0


@pytest.fixture(autouse=True)
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No process and no descriptor outlives the test; yields the mark by which processes are known."""
    with all_closed(), processes.leaving_none(monkeypatch) as mark:
        yield mark


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.new_chain(tmp_path)


@pytest.fixture
def place(tmp_path: Path, chain: SmallChain) -> Iterator[Path]:
    """Where a device is mounted that is the source of the chain, and has some noise on it."""
    place = tmp_path / "place"
    with loop.mounted(tmp_path / "backing", place) as chain.source:
        (place / "noise").write_bytes(NOISE)
        os.sync()
        yield place


class Meanwhile(Progress):
    """Does something once the source was opened and before any of it was received."""

    def __init__(self, do: Callable[[], object]) -> None:
        self._do = do

    def begin(self, total: int | None) -> None:
        self._do()


@contextmanager
def repeated(do: Callable[[], object]) -> Iterator[None]:
    """Do something over and over, in a thread."""
    stopped = threading.Event()

    def work() -> None:
        while not stopped.wait(0.005):
            do()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()


def write_to(place: Path) -> None:
    with (place / "log").open("ab") as file:
        file.write(b"a line\n")
        os.fsync(file.fileno())


def backed_up(chain: SmallChain, *options: str | Path) -> "tuple[int, dict[str, object], str]":
    """Run the command; return its exit status, the manifest it made, and what it said on standard error."""
    result = commands.run("blockdiff", "backup", "--json", chain.name, chain.source, *options)
    return result.returncode, json.loads(result.stdout), result.stderr.decode()


# --- what is said of a source that is in use, or written to


def test_a_mounted_device_that_is_written_to_is_a_warning(chain: SmallChain, place: Path) -> None:
    with repeated(lambda: write_to(place)):
        status, made, said = backed_up(chain, "--bwlimit", "64K")
    assert said == (
        f"blockdiff: warning: {chain.source} is mounted on {place} and was written to while it was read: use --lvm, or "
        "freeze it with --before and --after; this generation may not be one point in time\n"
    )
    assert (status, made["consistency"], made["quiesced"]) == (3, "changing", None)


def test_a_mounted_device_that_nobody_wrote_to_is_a_warning_as_well(chain: SmallChain, place: Path) -> None:
    status, made, said = backed_up(chain)
    assert said == (
        f"blockdiff: warning: {chain.source} is mounted on {place}: use --lvm, or freeze it with --before and "
        "--after; what was not on the disk yet when it was read is missing\n"
    )
    assert (status, made["consistency"]) == (3, "live")


def test_a_device_that_is_not_in_use_is_still(chain: SmallChain, tmp_path: Path) -> None:
    loop.make_file_system(tmp_path / "backing")
    with loop.device(tmp_path / "backing") as chain.source:
        status, made, said = backed_up(chain)
        assert (status, said, made["consistency"]) == (0, "", "still")
        with loop.mount(chain.source, tmp_path / "place", "-o", "ro"):
            status, made, said = backed_up(chain)
        assert (status, said, made["consistency"]) == (0, "", "still")


def test_a_device_that_tells_nothing_is_a_warning(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "backing").write_bytes(NOISE)
    with loop.device(tmp_path / "backing") as chain.source:
        counting = Path("/sys/block", chain.source.name, "queue", "iostats")
        counting.write_text("0")
        try:
            status, made, said = backed_up(chain)
        finally:
            counting.write_text("1")
    assert said == (
        f"blockdiff: warning: {chain.source} does not report whether it was written to: use --lvm, or freeze it "
        "with --before and --after; if it was, this generation may not be one point in time\n"
    )
    assert (status, made["consistency"]) == (3, "live")


def test_an_image_that_is_mounted_is_a_warning(chain: SmallChain, tmp_path: Path) -> None:
    with loop.mounted(tmp_path / "backing", tmp_path / "place") as device:
        chain.source = tmp_path / "backing"
        os.sync()
        status, made, said = backed_up(chain)
    assert said == (
        f"blockdiff: warning: {chain.source} is mounted on {tmp_path}/place ({device.name}): back up a snapshot, or "
        "freeze it with --before and --after; what was not on the disk yet when it was read is missing\n"
    )
    assert (status, made["consistency"]) == (3, "live")


def test_a_file_whose_mtime_is_put_back_is_a_warning(chain: SmallChain) -> None:
    chain.source.write_bytes(NOISE)
    before = chain.source.stat()

    def change() -> None:
        with chain.source.open("r+b") as file:
            file.write(os.urandom(10))
        os.utime(chain.source, ns=(before.st_atime_ns, before.st_mtime_ns))

    with repeated(change):
        status, made, said = backed_up(chain, "--bwlimit", "64K")
    assert (status, made["consistency"]) == (3, "changing")
    assert said.endswith(
        " while it was read: back up a snapshot, or freeze it with --before and --after; "
        "this generation may not be one point in time\n"
    )


def test_of_a_comparison_with_a_source_in_use_it_is_said(chain: SmallChain, place: Path) -> None:
    backed_up(chain)
    write_to(place)
    result = commands.run("blockdiff", "verify", chain.name, "--source", chain.source)
    assert result.returncode == 1
    note = f"note: {chain.source} is mounted on {place}: what differs may come from that"
    assert result.stderr.decode().splitlines()[1] == f"blockdiff: {note}"


@pytest.mark.parametrize("streams", [2, 3])
def test_with_several_streams_the_worst_that_one_has_seen_counts(
    chain: SmallChain, large_tmp_path: Path, streams: int
) -> None:
    chain.source = large_tmp_path / "image"
    chain.source.write_bytes(NOISE * 200)
    touch = Meanwhile(lambda: os.utime(chain.source))
    result = chain.add(None, backup.Options(streams=streams), touch)
    assert result.manifest.consistency == "changing" and "was written to" in result.warnings[0]


# --- held still


def test_a_mounted_device_that_is_frozen_is_quiesced(chain: SmallChain, place: Path, tmp_path: Path) -> None:
    freeze = require_program("fsfreeze")
    (place / "unwritten").write_bytes(b"the last words")  # in memory alone, until the file system is frozen
    words = ("--before", f"{freeze} -f '{place}'", "--after", f"{freeze} -u '{place}'")
    status, made, said = backed_up(chain, *words)
    assert (status, said, made["consistency"]) == (0, "", "quiesced")
    quiesced = made["quiesced"]
    assert isinstance(quiesced, dict) and quiesced["by"] == "freeze" and 0 < quiesced["held_s"] < LIMIT_S
    write_to(place)  # it goes on
    (tmp_path / "restored").write_bytes(chain.restored(1))
    subprocess.run(["e2fsck", "-fn", tmp_path / "restored"], check=True, timeout=60, capture_output=True)
    assert b"the last words" in (tmp_path / "restored").read_bytes()


def test_a_file_on_a_frozen_file_system_is_quiesced(chain: SmallChain, place: Path) -> None:
    """What is in memory of it is written before it is read: that must not wait for the thaw."""
    freeze = require_program("fsfreeze")
    chain.source = place / "noise"
    with chain.source.open("ab") as file:
        file.write(b"the last words")
    words = ("--before", f"{freeze} -f '{place}'", "--after", f"{freeze} -u '{place}'")
    status, made, said = backed_up(chain, *words)
    assert (status, said, made["consistency"]) == (0, "", "quiesced")
    assert chain.restored(1) == NOISE + b"the last words"


def test_a_file_is_held_until_its_last_byte_was_read(chain: SmallChain, tmp_path: Path, large_tmp_path: Path) -> None:
    chain.source = large_tmp_path / "image"
    chain.source.write_bytes(NOISE * 200)
    log = tmp_path / "log"
    found: list[str] = []
    options = backup.Options(before=f"echo before >> '{log}'", after=f"echo after >> '{log}'")
    made = chain.add(None, options, Meanwhile(lambda: found.append(log.read_text()))).manifest
    assert (found, log.read_text()) == (["before\n"], "before\nafter\n")
    assert made.consistency == "quiesced" and made.quiesced is not None and made.quiesced.by == "freeze"


def test_before_may_make_what_is_read(chain: SmallChain) -> None:
    for number in (1, 2):  # the second takes the place of the first
        make = f"echo content {number} > '{chain.source}.new' && mv '{chain.source}.new' '{chain.source}'"
        status, made, said = backed_up(chain, "--before", make, "--after", f"rm '{chain.source}'")
        assert (status, said, made["consistency"]) == (0, "", "quiesced")
        assert chain.restored(number) == f"content {number}\n".encode()
        assert not chain.source.exists()


def test_what_before_itself_writes_does_not_count(chain: SmallChain) -> None:
    chain.source.write_bytes(NOISE)
    assert backed_up(chain, "--before", f"echo x >> '{chain.source}'")[0] == 0
    assert backed_up(chain, "--after", f"echo x >> '{chain.source}'")[0] == 0
    assert chain.restored(1) == chain.restored(2) == NOISE + b"x\n"
    assert chain.source.read_bytes() == NOISE + b"x\nx\n"


def test_after_alone_holds_nothing(chain: SmallChain) -> None:
    chain.source.write_bytes(NOISE)
    _status, made, _said = backed_up(chain, "--after", "true")
    assert (made["consistency"], made["quiesced"]) == ("still", None)


def test_what_is_written_to_although_it_should_be_held_is_a_warning(chain: SmallChain, large_tmp_path: Path) -> None:
    chain.source = large_tmp_path / "image"
    chain.source.write_bytes(NOISE * 200)
    touch = Meanwhile(lambda: os.utime(chain.source))
    result = chain.add(None, backup.Options(before="true"), touch)
    assert result.manifest.consistency == "changing"
    (warning,) = result.warnings
    assert warning == (
        f"{chain.source} was written to while it was read: --before did not freeze it; "
        "this generation may not be one point in time"
    )


@pytest.mark.parametrize("option", ["--before", "--after"])
def test_a_command_that_fails_fails_the_run(chain: SmallChain, option: str) -> None:
    chain.source.write_bytes(NOISE)
    result = commands.run("blockdiff", "backup", chain.name, chain.source, option, "exit 3")
    assert result.returncode == 1
    said = f"blockdiff: localhost: the command of {option} failed: /bin/sh -c exit 3 exited with status 3"
    assert result.stderr.decode().splitlines()[0] == said
    assert chain.files() == {}


@pytest.mark.parametrize("victim", ["the server", "the agent"])
def test_a_run_that_is_killed_lets_go(chain: SmallChain, tmp_path: Path, mark: str, victim: str) -> None:
    chain.source.write_bytes(NOISE)
    log = tmp_path / "log"
    words = ("--before", f"echo before >> '{log}'", "--after", f"echo after >> '{log}'", "--bwlimit", "1K")
    with commands.started("blockdiff", "backup", chain.name, chain.source, *words) as process:
        deadline = time.monotonic() + LIMIT_S
        while not list(chain.directory.glob(".disk.1.gz.tmp")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert log.read_text() == "before\n"
        if victim == "the server":
            process.kill()
        else:
            (agent,) = [pid for pid, line in processes.marked(mark).items() if "blockdiff-agent" in line]
            os.kill(agent, signal.SIGKILL)
        process.wait(LIMIT_S)
        processes.wait_until_gone(mark)
    assert log.read_text() == "before\nafter\n"
