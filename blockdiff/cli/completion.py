"""What a shell completes: the arguments that are files, and those that are NAMEs of chains; click knows the rest."""

import os
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

#: Holds what the shell asks for; the name is click's.
VARIABLE = "_BLOCKDIFF_COMPLETE"


def chains(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Return the chains whose NAME begins so, and the directories; if there is no chain, the shell continues."""
    from click.shell_completion import CompletionItem

    path, begin = os.path.split(incomplete)
    found = [name for name in _chains_in(path) if name.startswith(begin) and name.isprintable()]
    if not found:
        return [CompletionItem(incomplete, type="dir")]
    directories = [each + "/" for each in _directories_in(path) if each.startswith(begin) and each.isprintable()]
    return [CompletionItem(os.path.join(path, each)) for each in found + directories]


def files(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
    """Let the shell complete the name of a file."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def answer(cli: click.Command, instruction: str) -> int:
    """Print what the shell asks for, and return the exit status."""
    from click.shell_completion import shell_complete

    return shell_complete(cli, {}, "blockdiff", VARIABLE, instruction)


def _chains_in(path: str) -> list[str]:
    from blockdiff.chain.durable import Directory
    from blockdiff.chain.inventory import Inventory
    from blockdiff.shared.errors import StorageError

    try:
        with Directory(os.path.expanduser(path) or ".") as directory:
            return Inventory(directory).bases()
    except StorageError:
        return []  # a user is typing: what cannot be read offers no completion


def _directories_in(path: str) -> list[str]:
    try:
        with os.scandir(os.path.expanduser(path) or ".") as entries:
            return sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))
    except OSError:
        return []
