"""``blockdiff snapshots``: what runs have left on a host."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import click

from blockdiff import transport
from blockdiff.cli.arguments import agent_prefix
from blockdiff.cli.output import check_printed, print_rows, say, shown_time
from blockdiff.session import snapshots
from blockdiff.session.rules import Left
from blockdiff.session.session import Session
from blockdiff.shared.blocks import shown_size
from blockdiff.shared.errors import EXIT_FAILED
from blockdiff.transport import address
from blockdiff.transport.address import Address


@click.command("snapshots")
@click.argument("host", required=False, metavar="[[USER@]HOST]")
@click.option("--remove", multiple=True, metavar="GROUP/NAME", help="Remove this snapshot. Repeatable.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--transport", "via", type=click.Choice(list(transport.NAMES)), help="Default ssh, if it is installed.")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE", help="As for ssh -o.")
def command(
    host: str | None, remove: tuple[str, ...], as_json: bool, via: str | None, ssh_options: tuple[str, ...]
) -> None:
    """Show or remove the LVM snapshots that runs left on a host.

    HOST is [user@]host or ssh://[user@]host[:port]/; without it, this machine. Shows for which chain each was made, and
    why it exists. No run removes one that was kept for a volume or a chain that no longer exists: use --remove.
    Snapshots that blockdiff did not make are neither shown nor removed.

    \b
    Examples:
      blockdiff snapshots root@kvm1
      blockdiff snapshots root@kvm1 --remove vg/bd_0123456789abcdef
    """
    with Session(_address(host), via, ssh_options, agent_prefix() or ()) as session:
        answer = session.leftovers(remove)
        session.finish()
    if as_json:
        found = [{**asdict(left), "useless": snapshots.is_useless(left)} for left in answer.found]
        summary = {"snapshots": found, "removed": answer.removed, "failures": answer.failures}
        click.echo(json.dumps(summary, indent=1))
    elif remove:
        for name in answer.removed:
            click.echo(f"removed {name}")
    else:
        _print_table(answer.found)
    if not remove:
        check_printed()
    for failure in answer.failures:
        say(failure)
    if answer.failures:
        sys.exit(EXIT_FAILED)


def _address(host: str | None) -> Address:
    if host is None:
        return Address(None, "")
    return address.parse(host) if host.startswith("ssh://") else address.parse_login(host)


def _print_table(found: Sequence[Left]) -> None:
    if not found:
        return
    rows = [("snapshot", "volume", "size", "made", "chain", "why it exists")]
    rows += [
        (
            left.name,
            left.volume or "-",
            shown_size(left.size),
            shown_time(left.made),
            left.chain or "-",
            snapshots.why(left),
        )
        for left in found
    ]
    print_rows(rows, right=(2,))
