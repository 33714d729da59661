"""``blockdiff authorize``: narrow what a key may do on a host."""

import re
from typing import TextIO

import click

from blockdiff import bundle
from blockdiff.errors import UsageError
from blockdiff.grant import MYSQL


@click.command("authorize")
@click.argument("granted", nargs=-1, metavar="[SOURCE | mysql:SOCKET | mysql:PORT]...")
@click.option("--key", type=click.File(), metavar="FILE", help="The public key: print its line for authorized_keys.")
@click.option("--script", is_flag=True, help="Print a program to install on the host, such as for sudo.")
def command(granted: tuple[str, ...], key: TextIO | None, script: bool) -> None:
    """Print what makes a host accept this very agent, for some sources, and nothing else.

    With --key, the line for authorized_keys: whoever has the key can back up the sources, by this version of blockdiff,
    and connect to the database's sockets or ports; no shell, no other command, no --before and --after. With --script,
    a program that does the same, with what is granted as its arguments.
    """
    if script and key is None and not granted:
        click.echo(bundle.pinned_script(), nl=False)
        return
    if script or key is None or not granted:
        raise UsageError("authorize takes either --key FILE and what is granted, or --script alone")
    for word in granted:
        if not re.fullmatch(rf"({MYSQL})?/.+|{MYSQL}[0-9]+", word, re.DOTALL):
            raise UsageError(f"{word} is neither a path nor mysql:SOCKET nor mysql:PORT")
    line = bundle.pinned_command(granted)
    escaped = line.replace("\\", "\\\\").replace('"', '\\"')
    click.echo(f'restrict,command="{escaped}" {key.read().strip()}')
