"""The `blockdiff` command: each of its commands has its own module, imported when it is asked for."""

import os
import sys
from importlib import import_module

import click

from blockdiff import __version__
from blockdiff.cli import completion
from blockdiff.cli.outcome import run


class _Commands(click.Group):
    """The commands; those that are not asked for cost nothing."""

    _NAMES = ("authorize", "backup", "list", "repair", "restore", "snapshots", "status", "verify")

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return list(self._NAMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name in self._NAMES and cmd_name not in self.commands:
            self.add_command(import_module(f"blockdiff.cli.{cmd_name}").command)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="blockdiff %(version)s")
def cli() -> None:
    """Block-level incremental backups of volumes and disk images, pulled over SSH.

    Exit status: 0 done, 1 failed, 2 usage, 3 done with a warning, 4 chain is busy, 5 backup data damaged,
    128+N ended by signal N.
    """


def main() -> None:
    """The entry point."""
    if (instruction := os.environ.get(completion.VARIABLE)) is not None:
        sys.exit(completion.answer(cli, instruction))
    run(cli, "blockdiff")
