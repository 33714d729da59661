"""``blockdiff repair``: repair a chain."""

import json
import sys
from contextlib import ExitStack

import click

from blockdiff.chain.generations import Chain
from blockdiff.check import renamed, repair
from blockdiff.cli import completion
from blockdiff.cli.output import say, watched
from blockdiff.shared.errors import EXIT_DAMAGED, printable
from blockdiff.transport import address
from blockdiff.transport.address import Address


@click.command("repair")
@click.argument("name", shell_complete=completion.chains)
@click.option("--source", metavar="SOURCE", help="Only let the chain continue with its source under this name.")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done, or would be, as JSON.")
def command(name: str, source: str | None, dry_run: bool, as_json: bool) -> None:
    """Repair the chain NAME, and report what was done.

    NAME.ver, manifests and digest tables are rebuilt from the files that exist. What follows the last generation that
    can be restored is set aside: renamed to ….aside-1, not removed. Reads everything. A second run finds nothing to
    do. Exit status 5 if generations are lost.

    With --source nothing is read or repaired: the last manifest gets a new name of the same source, because its host
    was renamed, or is written otherwise. The one that was there is set aside.

    \b
    Examples:
      blockdiff repair /var/backup/web1 --dry-run
      blockdiff repair /var/backup/web1 --source root@web2:/srv/web1.img
    """
    if source is not None:
        _report(name, _rename(name, address.parse(source), dry_run), repair.Plan(), dry_run, as_json)
        return
    told: list[str] = []
    with ExitStack() as stack:
        progress = stack.enter_context(watched("repair"))
        chain = stack.enter_context(Chain(name))
        if not chain.generations:
            chain.generation(None)  # raises the error that names what is missing
        progress.begin(None)
        if dry_run:
            plan = stack.enter_context(repair.planned(chain, progress.advance))
        else:

            def tell(text: str) -> None:
                told.append(text)
                if not as_json:
                    with progress.aside():
                        click.echo(text)

            plan = repair.repair(name, progress.advance, tell)
    if as_json or dry_run:
        _report(name, told or [deed.text for deed in plan.deeds], plan, dry_run, as_json)
    for number, why in plan.lost.items():
        say(f"generation {number} is lost: {printable(why)}")
    if plan.advice is not None:
        click.echo(f"  {printable(plan.advice)}", err=True)
    if plan.lost:
        sys.exit(EXIT_DAMAGED)


def _rename(name: str, where: Address, dry_run: bool) -> list[str]:
    """Return what was done, or would be, so that the chain continues with its source at another address."""
    if not dry_run:
        return renamed.rename(name, where)
    with Chain(name) as chain:
        found = renamed.examine(chain, where)
        return [] if found is None else [found]


def _report(name: str, deeds: list[str], plan: repair.Plan, dry_run: bool, as_json: bool) -> None:
    if not as_json:
        for text in deeds:
            click.echo(f"would be done: {text}" if dry_run else text)
        return
    lost = [{"generation": number, "problem": why} for number, why in plan.lost.items()]
    found = {"name": name, "dry_run": dry_run, "deeds": deeds, "lost": lost, "advice": plan.advice}
    click.echo(json.dumps(found, indent=1))
