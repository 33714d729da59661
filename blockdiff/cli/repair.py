"""``blockdiff repair``: put a chain in order."""

import sys
from contextlib import ExitStack

import click

from blockdiff import repair
from blockdiff.chain import Chain
from blockdiff.cli import say, watched
from blockdiff.errors import EXIT_DAMAGED, printable


@click.command("repair")
@click.argument("name")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
def command(name: str, dry_run: bool) -> None:
    """Put the chain NAME in order, and say what was done.

    NAME.ver, manifests and digest tables are rebuilt from what is there. Behind the last generation that can be
    restored, what cannot is set aside: renamed to ….aside-1, not removed. Reads everything. Run again, nothing is left
    to do. Exit status 5 where generations are lost.
    """
    with ExitStack() as stack:
        progress = stack.enter_context(watched("repair"))
        chain = stack.enter_context(Chain(name))
        if not chain.generations:
            chain.generation(None)  # says what is not there
        progress.begin(None)
        if dry_run:
            findings = repair.examine(chain, progress.advance)
        else:

            def tell(text: str) -> None:
                with progress.aside():
                    click.echo(text)

            findings = repair.repair(name, progress.advance, tell)
    for deed in findings.deeds if dry_run else ():
        click.echo(f"would be done: {deed.text}")
    for number, why in findings.lost.items():
        say(f"generation {number} is lost: {printable(why)}")
    if findings.advice is not None:
        click.echo(f"  {printable(findings.advice)}", err=True)
    if findings.lost:
        sys.exit(EXIT_DAMAGED)
