"""cronlog: the log of a command, printed only where it failed."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blockdiff.original import cronlog as module
from blockdiff.shared.errors import BlockdiffError
from tests import commands, mounts
from tests.mariadb import wait_for
from tests.mounts import without_places

EXITED = "command exited with code:%d"
RULE = "-" * 78 + "\n"
HOST = socket.gethostname()
STAMP = r"\[(Mon|Tue|Wed|Thu|Fri|Sat|Sun) [A-Z][a-z]{2} [ 0-3][0-9] [0-9:]{8} [0-9]{4}\] "


def cronlog(*arguments: str | Path) -> tuple[int, str, str]:
    """Run cronlog; return its exit status and what it printed."""
    result = commands.run("cronlog", *arguments)
    return result.returncode, result.stdout.decode(), result.stderr.decode()


def test_a_command_that_succeeds_is_logged_and_not_shown(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert cronlog("-l", log, "echo", "one  two") == (0, "", "")
    assert log.read_text().splitlines() == ["-" * 78, f"{HOST} starting: echo one  two", "one  two", EXITED % 0]


def test_the_log_of_a_command_that_fails_is_shown_from_its_own_beginning(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("what was there before\n")
    status, shown, _ = cronlog(f"--logfile={log}", "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    assert status == 3
    assert shown.splitlines()[1:] == ["out", "err", EXITED % 3]
    assert log.read_text() == "what was there before\n" + RULE + shown


def test_without_a_log_file_the_output_is_kept_for_a_failure() -> None:
    status, shown, _ = cronlog("sh", "-c", "echo out; exit 1")
    assert status == 1 and shown.splitlines()[1:] == ["out", EXITED % 1]


def test_print_always_shows_the_log_of_a_success() -> None:
    status, shown, _ = cronlog("-p", "echo", "out")
    assert status == 0 and shown.splitlines()[1:] == ["out", EXITED % 0]


def test_each_line_but_the_rule_is_stamped_as_by_the_original(tmp_path: Path) -> None:
    log = tmp_path / "log"
    _, shown, _ = cronlog("-t", "-p", "-l", log, "printf", "a\nno newline at the end")
    lines = shown.splitlines()
    assert len(lines) == 4 and all(re.match(STAMP, line) for line in lines)
    starting = f"{HOST} starting: printf a\\nno newline at the end"
    assert [re.sub(STAMP, "", line) for line in lines] == [starting, "a", "no newline at the end", EXITED % 0]
    assert log.read_text() == RULE + shown


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_command_that_dies_of_a_signal_exits_as_in_a_shell(number: signal.Signals) -> None:
    status, shown, _ = cronlog("sh", "-c", f"kill -{number:d} $$")
    assert status == 128 + number and shown.splitlines()[-1] == f"command died with signal:{number:d}"


def test_a_command_that_is_not_there_is_logged_and_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    status, shown, said = cronlog("-l", log, "no-such-command-here")
    assert status == 1 and "failed to execute no-such-command-here: No such file" in shown
    assert (
        said.startswith("blockdiff: cannot run no-such-command-here: No such file") and RULE + shown == log.read_text()
    )


def test_options_behind_the_command_are_the_command_s_own() -> None:
    status, shown, _ = cronlog("-p", "echo", "-t", "--help", "-l")
    assert status == 0 and shown.splitlines()[1] == "-t --help -l"


def test_bytes_that_are_no_text_are_logged_as_they_are(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert cronlog("-l", log, "printf", r"\377\000x\n")[0] == 0
    assert log.read_bytes().splitlines()[2] == b"\xff\0x"


def test_lines_are_logged_as_they_come(tmp_path: Path) -> None:
    log, fifo = tmp_path / "log", tmp_path / "fifo"
    os.mkfifo(fifo)
    with commands.started("cronlog", "-l", log, "sh", "-c", f"echo first; cat {fifo}") as child:
        with fifo.open("wb"):  # the command is behind its first line now, and not at its end
            wait_for(lambda: log.read_text().splitlines()[-1] == "first", "the line")
        assert child.wait(30) == 0


@pytest.mark.parametrize("rest", ["missing/log", "."])
def test_a_path_that_cannot_be_a_log_is_refused_before_anything_runs(tmp_path: Path, rest: str) -> None:
    status, _, said = cronlog("-l", tmp_path / rest, "touch", tmp_path / "done")
    assert status == 1 and f"cannot open the log {tmp_path / rest}: " in said
    assert not (tmp_path / "done").exists()


def test_a_log_that_is_cut_meanwhile_takes_nothing_from_what_is_shown(tmp_path: Path) -> None:
    """As `logrotate` does with copytruncate."""
    log = tmp_path / "log"
    log.write_text("what was there before\n" * 1000)
    status, shown, said = cronlog("-l", log, "sh", "-c", f"echo first; : >'{log}'; echo last; exit 3")
    assert (status, said) == (3, "")
    assert shown.splitlines()[1:] == ["first", "last", EXITED % 3]
    assert log.read_text().splitlines()[-2:] == ["last", EXITED % 3]


def test_more_than_memory_is_kept_for(tmp_path: Path) -> None:
    status, shown, said = cronlog("-l", tmp_path / "log", "sh", "-c", "seq 1 500000; exit 1")
    assert (status, said) == (1, "")
    assert shown.splitlines()[1:-1] == [str(number) for number in range(1, 500001)]


def test_a_temporary_file_that_cannot_be_made_costs_only_what_does_not_fit_in_memory(tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = without_places(tmp_path)
    result = commands.run(
        "cronlog", "-l", log, "sh", "-c", "seq 1 500000; exit 1", under=words, env={"TMPDIR": "/proc"}
    )
    assert result.returncode == 1
    assert b"warning: there is no directory for temporary files" in result.stderr
    assert result.stdout.splitlines()[1:1000] == [b"%d" % number for number in range(1, 1000)]
    assert log.read_text().splitlines()[-1] == EXITED % 1
    result = commands.run("cronlog", "-l", log, "sh", "-c", "seq 1 500000", under=words, env={"TMPDIR": "/proc"})
    assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")


def test_what_the_command_leaves_behind_with_its_output_open_is_not_waited_for(tmp_path: Path) -> None:
    log = tmp_path / "log"
    begun = f"(until [ -e '{tmp_path}/go' ]; do sleep 0.01; done; touch '{tmp_path}/done') & echo told; exit 2"
    status, shown, said = cronlog("-l", log, "sh", "-c", begun)
    assert not (tmp_path / "done").exists()
    (tmp_path / "go").touch()
    wait_for((tmp_path / "done").exists, "what was left running")
    assert (status, said) == (2, "")
    left = "what the command left running still has its output open; it is no longer logged"
    assert shown.splitlines()[1:] == ["told", left, EXITED % 2]
    assert log.read_text() == RULE + shown


def test_a_log_that_is_standard_output_has_everything_once() -> None:
    status, shown, said = cronlog("-l", "/dev/stdout", "sh", "-c", "echo out; exit 3")
    assert (status, said) == (3, "")
    assert shown.splitlines() == [RULE.strip(), f"{HOST} starting: sh -c echo out; exit 3", "out", EXITED % 3]


def test_a_log_that_is_a_socket_on_standard_output_is_written(tmp_path: Path) -> None:
    """As under systemd, whose journal it is: such a thing cannot be opened."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            words = [sys.executable, str(commands.BIN / "cronlog"), "-l", "/dev/stdout", "echo", "out"]
            status = subprocess.run(words, stdout=theirs.fileno(), timeout=60, check=False).returncode
        assert status == 0
        assert b"".join(iter(lambda: ours.recv(4096), b"")).splitlines()[2:] == [b"out", (EXITED % 0).encode()]


def test_a_pipe_that_nobody_reads_as_log_keeps_no_command_from_running(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    status, shown, said = cronlog("-l", fifo, "sh", "-c", f"echo out; touch '{tmp_path}/done'")
    assert status == 0 and (tmp_path / "done").exists()
    assert said.startswith(f"blockdiff: warning: cannot open the log {fifo}: No such device or address")
    assert shown.splitlines()[1:] == ["out", EXITED % 0]


def test_a_pipe_that_is_read_is_a_log(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with open(os.open(fifo, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        assert cronlog("-l", fifo, "echo", "out") == (0, "", "")
        assert reader.read().decode() == f"{RULE}{HOST} starting: echo out\nout\n{EXITED % 0}\n"


def test_a_pipe_that_is_read_no_more_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.2)
    fifo, output = tmp_path / "fifo", io.BytesIO()
    os.mkfifo(fifo)
    warnings: list[BlockdiffError] = []
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        status = module.run_logged(["seq", "1", "100000"], str(fifo), False, False, output, warnings.append)
    finally:
        os.close(reader)
    assert status == 0 and output.getvalue().splitlines()[1:-1] == [b"%d" % number for number in range(1, 100001)]
    (warning,) = warnings
    assert warning.message == f"cannot write the log {fifo}: Resource temporarily unavailable"


@pytest.mark.parametrize("status", [0, 3])
def test_a_log_on_a_full_disk_ends_no_command(tmp_path: Path, status: int) -> None:
    script = f"echo out; touch '{tmp_path}/done'; exit {status}"
    ended, shown, said = cronlog("-l", "/dev/full", "sh", "-c", script)
    assert ended == status and (tmp_path / "done").exists()
    assert said.splitlines() == [
        "blockdiff: warning: cannot write the log /dev/full: No space left on device",
        "  what this run said from there on is not in it",
    ]
    assert shown.splitlines()[1:] == ["out", EXITED % status]


def test_a_disk_without_room_for_the_log_keeps_no_command_from_running(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "log", "nr_inodes=1") as directory:
        status, shown, said = cronlog("-l", directory / "log", "touch", tmp_path / "done")
    assert status == 0 and (tmp_path / "done").exists()
    assert f"warning: cannot open the log {directory}/log: No space left on device" in said
    assert shown.splitlines()[1:] == [EXITED % 0]


@pytest.mark.parametrize("arguments", [[], ["-l"], ["--no-such-option", "true"]])
def test_wrong_usage_exits_2(arguments: list[str]) -> None:
    assert cronlog(*arguments)[0] == 2


def test_a_signal_ends_the_command_as_well(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with commands.started("cronlog", "sh", "-c", f"echo $$; exec cat {fifo}") as child:
        with fifo.open("wb"):
            child.send_signal(signal.SIGTERM)
            assert child.wait(30) == 128 + signal.SIGTERM
        with pytest.raises(OSError, match="No such device or address"):  # nobody reads any more
            os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
