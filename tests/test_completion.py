"""What bash, zsh and fish complete, asked for in the shells themselves."""

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from blockdiff.cli import modern
from tests import commands
from tests.conftest import require_program

# zsh completes at a terminal only: what its completion would be given is printed instead
BASH = """
eval "$(_BLOCKDIFF_COMPLETE=bash_source blockdiff)"
compopt() {{ echo "$@"; }}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); $(complete -p blockdiff | sed 's/.*-F //')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
ZSH = """
compdef() {{ function_name=$1; }}
compadd() {{ print -l -- $completions; }}
_describe() {{ print -l -- ${{completions_with_descriptions%%:*}}; }}
_path_files() {{ print -- $1; }}
eval "$(_BLOCKDIFF_COMPLETE=zsh_source blockdiff)"
words=({words}); CURRENT=$#words; $function_name
"""
FISH = """
_BLOCKDIFF_COMPLETE=fish_source blockdiff | source
complete -C '{line}' | string replace -r '\\t.*' ''
"""


def completed(shell: str, line: str, directory: Path) -> set[str]:
    """Return what a shell offers at the end of a line."""
    words = " ".join(word or "''" for word in line.split(" "))
    script = {"bash": BASH, "zsh": ZSH, "fish": FISH}[shell]
    done = subprocess.run(
        [require_program(shell), *(["-f"] if shell == "zsh" else []), "-c", script.format(words=words, line=line)],
        cwd=directory,
        env={**os.environ, "PATH": commands.PATH, "HOME": str(directory)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.stderr == b"", done
    return {line for line in done.stdout.decode().splitlines() if line}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("completion")
    for name in ("web1", "web2", "db"):
        (place / f"{name}.ver").write_text("1\n")
        (place / f"{name}.1.gz").touch()
    (place / "website").mkdir()
    (place / "image.raw").touch()
    return place


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_and_options_are_completed(shell: str, directory: Path) -> None:
    assert completed(shell, "blockdiff re", directory) == {"repair", "restore"}
    assert {"--salvage", "--force"} <= completed(shell, "blockdiff restore --", directory)
    assert completed(shell, "blockdiff backup --compression z", directory) == {"zstd"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_chains_are_completed_with_the_directories_beside_them(shell: str, directory: Path) -> None:
    assert completed(shell, "blockdiff list web", directory) == {"web1", "web2", "website/"}
    assert completed(shell, f"blockdiff verify {directory}/d", directory) == {f"{directory}/db"}


@pytest.mark.parametrize("name", ["backup", "list", "repair", "restore", "status", "verify"])
def test_every_command_completes_the_name_of_its_chain(name: str, directory: Path) -> None:
    command = modern.cli.get_command(click.Context(modern.cli), name)
    assert command is not None
    found = command.params[0].shell_complete(click.Context(command), f"{directory}/web1")
    assert [each.value for each in found] == [f"{directory}/web1"]


@pytest.mark.parametrize(("shell", "found"), [("bash", "-o default"), ("zsh", "-f"), ("fish", "image.raw")])
def test_files_are_completed_by_the_shell(shell: str, found: str, directory: Path) -> None:
    for line in ("backup web1 im", "status --prometheus im"):
        assert completed(shell, f"blockdiff {line}", directory) == {found}


@pytest.mark.parametrize(("shell", "found"), [("bash", {"-o dirnames"}), ("zsh", {"-/"}), ("fish", {"website/"})])
def test_where_no_chain_is_meant_the_shell_completes_directories(shell: str, found: set[str], directory: Path) -> None:
    assert completed(shell, "blockdiff list webs", directory) == found


def test_a_directory_that_is_not_there_offers_nothing(directory: Path) -> None:
    env = {"_BLOCKDIFF_COMPLETE": "bash_complete", "COMP_WORDS": "blockdiff list none/x", "COMP_CWORD": "2"}
    result = commands.run("blockdiff", cwd=directory, env=env)
    assert (result.returncode, result.stdout, result.stderr) == (0, b"dir,none/x\n", b"")


def test_what_completes_costs_nothing_until_a_shell_asks() -> None:
    script = "import blockdiff.cli.modern, blockdiff.cli.list, sys; print('click.shell_completion' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(commands.BIN.parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"False\n"
