"""The tools that are compared: for each phase the command line that does it."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Phases: `FULL`, `INCREMENTAL`, restore and verify, of a store that a tool keeps in a directory of its own.
FULL, INCREMENTAL, RESTORE, VERIFY = "full", "incremental", "restore", "verify"


@dataclass(frozen=True)
class Tool:
    """One tool with its options.

    `commands` are shell templates by phase; ``{image}``, ``{store}`` (a directory that is there), ``{number}`` (of the
    generation, from 1) and ``{target}`` (a path that is not there, for `RESTORE`) are filled in. `prepare` makes an
    empty store. `env` is for all of them, and may have ``{store}``, too.
    """

    name: str
    commands: Mapping[str, str]
    prepare: str = "true"
    env: Mapping[str, str] = field(default_factory=dict)
    version: Callable[[], str] = lambda: ""

    def command(self, phase: str, **places: object) -> str:
        """Return the command line of a phase."""
        return self.commands[phase].format(**places)

    def preparation(self, store: Path) -> str:
        """Return the command line that makes an empty store."""
        return self.prepare.format(store=store)

    def environment(self, store: Path) -> dict[str, str]:
        """Return the variables for its commands."""
        return {name: value.format(store=store) for name, value in self.env.items()}


def program() -> str:
    """Return the command blockdiff as it is installed beside this Python."""
    return str(Path(sys.executable).with_name("blockdiff"))


def blockdiff(label: str, options: str = "", source: str = "{image}") -> Tool:
    """Return blockdiff with the options of `backup`; `source` is its SOURCE."""
    backup = f"{program()} backup {{store}}/chain {source} {options}"
    return Tool(
        label,
        {
            FULL: backup,
            INCREMENTAL: backup,
            RESTORE: f"{program()} restore {{store}}/chain {{target}}",
            VERIFY: f"{program()} verify {{store}}/chain",
        },
    )


def borg() -> Tool:
    """borg with chunks of a fixed 64 KiB and lz4."""
    create = "borg create --compression lz4 --chunker-params fixed,65536 --files-cache disabled {store}/repo::{number}"
    return Tool(
        "borg",
        {
            FULL: create + " {image}",
            INCREMENTAL: create + " {image}",
            RESTORE: "borg extract --stdout {store}/repo::{number} > {target}",
            VERIFY: "borg check --verify-data {store}/repo",
        },
        prepare="borg init --encryption none {store}/repo",
        env={
            "BORG_BASE_DIR": "{store}/home",
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
            "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes",
        },
        version=lambda: _first_line("borg", "--version"),
    )


def restic() -> Tool:
    """restic as it is by default."""
    return Tool(
        "restic",
        {
            FULL: "restic backup --quiet {image}",
            INCREMENTAL: "restic backup --quiet --force {image}",
            RESTORE: "restic dump latest {image} > {target}",
            VERIFY: "restic check --quiet --read-data",
        },
        prepare="restic init --quiet",
        env={"RESTIC_REPOSITORY": "{store}/repo", "RESTIC_PASSWORD": "x", "RESTIC_CACHE_DIR": "{store}/cache"},
        version=lambda: _first_line("restic", "version"),
    )


def compressor(program: str, options: str, unpack: str) -> Tool:
    """A program that only compresses: a full backup is its output."""
    return Tool(
        f"{program} {options}",
        {
            FULL: f"{program} {options} -c < {{image}} > {{store}}/image.z",
            RESTORE: f"{unpack} -c < {{store}}/image.z > {{target}}",
        },
        version=lambda: _first_line(program, "--version"),
    )


def peers() -> list[Tool]:
    """Return the peers that this machine has; those that are missing are named on standard error."""
    known: dict[str, Callable[[], Tool]] = {
        "borg": borg,
        "restic": restic,
        "gzip": lambda: compressor("gzip", "-6", "gzip -d"),
        "pigz": lambda: compressor("pigz", "-1", "pigz -d"),
        "zstd": lambda: compressor("zstd", "-q -3 -T0", "zstd -q -d"),
    }
    for name in known:
        if shutil.which(name) is None:
            print(f"not installed, and left out: {name}", file=sys.stderr)
    return [make() for name, make in known.items() if shutil.which(name) is not None]


def named(text: str) -> Tool:
    """Return the peer that ``NAME=COMMAND`` describes: a template of a full backup from {image} to {store}."""
    name, separator, command = text.partition("=")
    if not separator:
        raise ValueError(f"{text} is not NAME=COMMAND")
    return Tool(name, {FULL: command})


def _first_line(*words: str) -> str:
    shown = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    return (shown.stdout or shown.stderr).splitlines()[0]
