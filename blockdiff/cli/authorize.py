"""``blockdiff authorize``: narrow what a key may do on a host."""

import os
import re
import shlex

import click

from blockdiff.cli import completion
from blockdiff.cli.output import check_printed, say
from blockdiff.shared.errors import UsageError, printable
from blockdiff.shared.grant import MYSQL
from blockdiff.transport import bundle, publickey


@click.command("authorize")
@click.argument("granted", nargs=-1, shell_complete=completion.files, metavar="[SOURCE | mysql:SOCKET | mysql:PORT]...")
@click.option(
    "--key",
    metavar="FILE",
    shell_complete=completion.files,
    help="The public key (id_….pub): print its line for authorized_keys.",
)
@click.option("--script", is_flag=True, help="Print a program to install on the host, such as for sudo.")
def command(granted: tuple[str, ...], key: str | None, script: bool) -> None:
    """Restrict a key to some sources, and to this agent.

    With --key, it prints the line for authorized_keys: the key can then only back up the sources, with this version of
    blockdiff, and connect to the database's sockets or ports; no shell, no other command, no --before and --after.
    FILE must hold exactly one public key. With --script, it prints a program that does the same. Its arguments say what
    it grants.

    \b
    Example:
      blockdiff authorize --key ~/.ssh/backup.pub /dev/vg/web1
    """
    if script and key is None and not granted:
        click.echo(bundle.pinned_script(), nl=False)
        check_printed()
        return
    if script or key is None or not granted:
        raise UsageError("authorize takes either --key FILE and what is granted, or --script alone")
    for word in granted:
        _check(word)
    public = publickey.read(key)
    # in quotes sshd takes \" for ", and every other backslash for itself
    command = bundle.pinned_command(granted).replace('"', '\\"')
    click.echo(os.fsencode(f'restrict,command="{command}" {public}'))
    check_printed()
    _tell_of_links([word for word in granted if word.startswith("/") and not word.startswith("/dev/")])


def _check(word: str) -> None:
    if not re.fullmatch(rf"({MYSQL})?/.+|{MYSQL}[0-9]+", word, re.DOTALL):
        raise UsageError(f"{printable(word)} is not a path, mysql:SOCKET or mysql:PORT")
    if re.search(r"[\n\r]", word):
        raise UsageError(
            f"{printable(word)} cannot be granted: it contains a line end, and a key has one line in authorized_keys",
            "give the source a path without one",
        )


def _tell_of_links(paths: list[str]) -> None:
    """Say what it means if users other than root can turn the paths into links; in /dev only root can."""
    if paths:
        say(
            "note: a path that is a symbolic link on the host is followed there, wherever it leads; "
            f"grant what this prints on the host: readlink -f {printable(shlex.join(paths))}"
        )
