"""cronlog: the log of a command, printed only where it failed."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests import commands
from tests.mariadb import wait_for

EXITED = "command exited with code:%d"
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
    assert shown.splitlines()[2:] == ["out", "err", EXITED % 3]
    assert log.read_text() == "what was there before\n" + shown


def test_without_a_log_file_the_output_is_kept_for_a_failure() -> None:
    status, shown, _ = cronlog("sh", "-c", "echo out; exit 1")
    assert status == 1 and shown.splitlines()[2:] == ["out", EXITED % 1]


def test_print_always_shows_the_log_of_a_success() -> None:
    status, shown, _ = cronlog("-p", "echo", "out")
    assert status == 0 and shown.splitlines()[2:] == ["out", EXITED % 0]


def test_each_line_is_stamped_as_by_the_original() -> None:
    _, shown, _ = cronlog("-t", "-p", "printf", "a\nno newline at the end")
    lines = shown.splitlines()
    assert len(lines) == 5 and all(re.match(STAMP, line) for line in lines)
    assert [re.sub(STAMP, "", line) for line in lines[2:]] == ["a", "no newline at the end", EXITED % 0]


def test_a_command_that_dies_of_a_signal_exits_255() -> None:
    status, shown, _ = cronlog("sh", "-c", "kill -9 $$")
    assert status == 255 and shown.splitlines()[-1] == "command died with signal:9"


def test_a_command_that_is_not_there_is_logged_and_told(tmp_path: Path) -> None:
    log = tmp_path / "log"
    status, shown, said = cronlog("-l", log, "no-such-command-here")
    assert status == 1 and "failed to execute no-such-command-here: No such file" in shown
    assert said.startswith("blockdiff: cannot run no-such-command-here: No such file") and shown == log.read_text()


def test_options_behind_the_command_are_the_command_s_own() -> None:
    status, shown, _ = cronlog("-p", "echo", "-t", "--help", "-l")
    assert status == 0 and shown.splitlines()[2] == "-t --help -l"


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


def test_a_log_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    status, _, said = cronlog("-l", tmp_path / "missing" / "log", "true")
    assert status == 1 and "cannot open the log" in said and "No such file or directory" in said


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
