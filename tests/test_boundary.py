"""Where a command ends: its exit status whatever becomes of what it prints, and sentences where the system refuses."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from blockdiff.cli import standard
from tests import chains, commands, mounts
from tests.chains import DAYS, SmallChain

#: What a shell does to the standard streams of a command.
STREAMS = {
    "closed": ">&- 2>&-",
    "full": ">/dev/full 2>/dev/full",
    "output closed": ">&-",
    "output full": ">/dev/full",
    "all closed": "<&- >&- 2>&-",
}
FULL = "blockdiff: cannot write to standard output: No space left on device\n  what was printed there is not complete\n"


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.some_days(tmp_path, 2)


def run(
    redirected: str, *words: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run a command of ``bin/`` with its streams redirected by the shell."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirected}', "sh", sys.executable, commands.BIN / str(words[0]), *words[1:]],
        env={**os.environ, "PATH": commands.PATH, **(env or {})},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def unread(*words: str | Path) -> "subprocess.CompletedProcess[str]":
    """Run a command whose standard output nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        return subprocess.run(
            [sys.executable, commands.BIN / str(words[0]), *words[1:]],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)


@pytest.mark.parametrize("streams", STREAMS)
def test_a_backup_is_done_whatever_becomes_of_its_summary(chain: SmallChain, streams: str) -> None:
    chain.source.write_bytes(DAYS[2])
    result = run(STREAMS[streams], "blockdiff", "backup", "--json", chain.name, chain.source)
    assert (result.returncode, result.stderr) == (0, FULL if streams == "output full" else "")
    assert chain.last() == 3


def test_a_backup_whose_summary_nobody_reads_is_done(chain: SmallChain) -> None:
    result = unread("blockdiff", "backup", "--json", chain.name, chain.source)
    assert (result.returncode, result.stderr) == (0, "")
    assert chain.last() == 3


@pytest.mark.parametrize("streams", STREAMS)
def test_statuses_of_what_is_wrong_stay_what_they_are(chain: SmallChain, tmp_path: Path, streams: str) -> None:
    redirected = STREAMS[streams]
    assert run(redirected, "blockdiff", "no-such-command").returncode == 2
    assert run(redirected, "blockdiff", "status", chain.name, tmp_path / "none").returncode == 2  # CRITICAL
    chain.file(".2.json").write_bytes(b"{}")
    assert run(redirected, "blockdiff", "restore", chain.name, tmp_path / "restored").returncode == 3
    chain.file(".2.gz").write_bytes(b"")
    assert run(redirected, "blockdiff", "verify", chain.name).returncode == 5
    assert run(redirected, "blockdiff", "restore", "--salvage", chain.name, tmp_path / "salvaged").returncode == 5
    assert run(redirected, "blockdiff", "list", chain.name).returncode == 5


def test_a_warning_of_monitoring_stays_one_where_nobody_reads(chain: SmallChain) -> None:
    chain.file(".3.gz").write_bytes(b"")
    assert commands.run("blockdiff", "status", chain.name).returncode == 1
    assert unread("blockdiff", "status", chain.name).returncode == 1


@pytest.mark.parametrize("words", [("list",), ("list", "--json")])
def test_what_was_asked_for_and_cannot_be_printed_is_a_failure(chain: SmallChain, words: Sequence[str]) -> None:
    result = run(">/dev/full", "blockdiff", *words, chain.name)
    assert (result.returncode, result.stderr) == (1, FULL)
    assert run(">&-", "blockdiff", *words, chain.name).returncode == 0


def test_repair_goes_on_where_nobody_reads_what_it_does(chain: SmallChain) -> None:
    chain.file(".ver").unlink()
    chain.file(".1.json").unlink()
    chain.file(".2.json").unlink()
    result = unread("blockdiff", "repair", chain.name)
    assert result.returncode == 0
    assert commands.done("blockdiff", "repair", chain.name) == b""


@pytest.mark.parametrize("streams", STREAMS)
def test_cronlog_runs_its_command_whatever_becomes_of_its_output(tmp_path: Path, streams: str) -> None:
    script = f"echo told; touch '{tmp_path}/done'; exit 7"
    assert run(STREAMS[streams], "cronlog", "-p", "sh", "-c", script).returncode == 7
    assert (tmp_path / "done").exists()


def test_a_stream_that_does_not_wait_is_waited_for(chain: SmallChain) -> None:
    """As ssh leaves a terminal or pipe that it shares with us."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    while True:
        try:
            os.write(writing, bytes(4096))
        except BlockingIOError:
            break
    with subprocess.Popen(
        [sys.executable, commands.BIN / "blockdiff", "list", "--json", chain.name], stdout=writing
    ) as child:
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            shown = file.read().lstrip(b"\0")
    assert child.returncode == 0 and len(json.loads(shown)) == 2


def test_what_finds_no_room_is_written_once_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    filled = os.write(writing, bytes(1 << 20))
    waits, written = threading.Event(), list[int]()

    def wait(read: list[int], write: list[int], special: list[int]) -> None:
        waits.set()
        select.select(read, write, special)

    monkeypatch.setattr(standard, "select", SimpleNamespace(select=wait))
    writer = threading.Thread(target=lambda: written.append(standard._Descriptor(writing).write(b"told")))
    writer.start()
    assert waits.wait(60) and len(os.read(reading, filled)) == filled
    writer.join(60)
    assert (written, os.read(reading, filled)) == ([4], b"told")
    os.close(reading)
    os.close(writing)


def test_what_cannot_be_encoded_is_shown_escaped() -> None:
    environment = {"PYTHONIOENCODING": "ascii"}
    result = commands.run("blockdiff", "repair", "--help", env=environment)
    assert result.returncode == 0 and result.stderr == b""


# What the system refuses


NO_PLACE = "there is no directory for temporary files: none of /proc, /tmp, /var/tmp can be written to"


def test_no_directory_for_temporary_files_is_named(chain: SmallChain) -> None:
    result = commands.run("blockdiff", "verify", chain.name, under=mounts.without_places(), env={"TMPDIR": "/proc"})
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode() == f"blockdiff: {NO_PLACE}\n  set TMPDIR to a writable directory\n"


def test_no_directory_for_the_old_table_is_named() -> None:
    words = [*mounts.without_places(), "sh", "-c", 'exec "$@" 5</dev/null 6>/dev/null', "sh"]
    result = commands.run("blockdiff_dump", under=words, env={"TMPDIR": "/proc"})
    assert result.returncode == 1 and f"blockdiff: {NO_PLACE}\n" in result.stderr.decode()


def test_a_current_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"image")
    script = 'mkdir "$1"; cd "$1"; rmdir "$1"; shift; exec "$@"'
    words = ["sh", "-c", script, "sh", str(tmp_path / "gone")]
    result = commands.run("blockdiff", "backup", "name", tmp_path / "source", under=words)
    assert result.returncode == 1
    said = "blockdiff: the current directory no longer exists\n  change to one that exists\n"
    assert result.stderr.decode().endswith(said), result


def of_raising(error: str, env: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run a command in whose work `error` is raised."""
    script = (
        "import sys\nimport blockdiff.cli.list as module\nfrom blockdiff.start import blockdiff\n"
        f"def fail(*_arguments): raise {error}\n"
        "module.split_name = fail\nsys.argv[1:] = ['list', 'name']\nblockdiff()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONDEVMODE",)}
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("OSError(5, 'Input/output error', '/srv/a\\nb')", "/srv/a\\nb: Input/output error\n"),
        ("OSError(18, 'Invalid link', 'a', None, 'b')", "a and b: Invalid link\n"),
        ("OSError(24, 'Too many', '/x')", "/x: Too many\n  raise the limit of open files (ulimit -n)\n"),
        ("BrokenPipeError(32, 'Broken pipe')", "the system refused: Broken pipe\n"),
        ("OSError('no address')", "the system refused: no address\n"),
    ],
)
def test_what_the_system_refuses_is_a_sentence_with_the_path(error: str, said: str) -> None:
    result = of_raising(error)
    assert (result.returncode, result.stderr) == (1, f"blockdiff: {said}")


@pytest.mark.parametrize("environment", [{"BLOCKDIFF_TRACE": "1"}, {"PYTHONDEVMODE": "1"}])
def test_a_fault_has_a_traceback_only_for_those_who_ask(environment: Mapping[str, str]) -> None:
    result = of_raising("ValueError('odd')")
    first, hint = result.stderr.splitlines()
    assert result.returncode == 1 and first == "blockdiff: this is a bug in blockdiff: ValueError: odd"
    assert "BLOCKDIFF_TRACE=FILE" in hint
    result = of_raising("ValueError('odd')", environment)
    assert "Traceback (most recent call last)" in result.stderr and first in result.stderr


# Signals


def test_an_interrupt_while_python_imports_ends_without_a_traceback(tmp_path: Path) -> None:
    """The first module that is imported by a command sends it."""
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\n")
    script = "from blockdiff.start import blockdiff; blockdiff()"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{commands.BIN.parent}"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("program", ["cronlog", "blockdiff_backup", "blockdiff_dump"])
def test_a_signal_ends_a_command_with_128_and_its_number(tmp_path: Path, program: str, number: signal.Signals) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    words: dict[str, list[str | Path]] = {
        "cronlog": ["sh", "-c", f"exec cat '{fifo}'"],
        "blockdiff_backup": [tmp_path / "name", "sh", "-c", f"exec cat '{fifo}'"],
        "blockdiff_dump": [fifo],
    }
    with subprocess.Popen(
        ["sh", "-c", 'exec "$@" 6>"$OUT"', "sh", sys.executable, commands.BIN / program, *words[program]],
        env={**os.environ, "PATH": commands.PATH, "OUT": str(tmp_path / "table")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        with fifo.open("wb"):  # it waits for what comes
            child.send_signal(number)
            assert child.wait(60) == 128 + number
        assert child.stderr is not None
        assert child.stderr.read() == f"blockdiff: stopped by {number.name}\n"


def test_every_command_is_installed_under_its_name() -> None:
    text = (commands.BIN.parent / "setup.cfg").read_text()
    installed = re.findall(r"^    (\w+) = blockdiff\.start:(\w+)$", text, re.MULTILINE)
    assert {name for name, _function in installed} == {
        path.name for path in commands.BIN.iterdir() if path.is_file() and not path.suffix
    }
    assert all(name == function for name, function in installed)
