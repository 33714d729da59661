"""``blockdiff backup``: one run, which adds a generation to a chain, or to several."""

import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from blockdiff import transport
from blockdiff.cli import completion
from blockdiff.cli.arguments import SECONDS, ByteSize, agent_prefix
from blockdiff.cli.output import say, watched
from blockdiff.format import codec
from blockdiff.shared import pipeline
from blockdiff.shared.blocks import DIGEST_SIZES, shown_size
from blockdiff.shared.errors import EXIT_WARNING, UsageError, printable
from blockdiff.transport import address
from blockdiff.transport.address import Address
from blockdiff.transport.advice import UnreachedError
from blockdiff.transport.connection import Connection

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from blockdiff.backup import Options, Result
    from blockdiff.cli.backupoptions import CommandLine
    from blockdiff.format.manifest import Source
    from blockdiff.plan import Plan


class SnapshotSize(click.ParamType[str]):
    """A number of bytes, or a share of the volume in percent, as the agent takes it."""

    name = "size"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return the number without a unit, or the share."""
        text = str(value)
        return text if re.fullmatch(r"0*[1-9][0-9]{0,14}%", text) else str(ByteSize().convert(value, param, ctx))


@click.command("backup")
@click.argument("name", shell_complete=completion.chains)
@click.argument("source", shell_complete=completion.files)
@click.option(
    "--block-size", type=ByteSize(), help="For a new chain; default 64K. An existing one keeps its own until --full."
)
@click.option("--digest", type=click.Choice(list(DIGEST_SIZES)), help="Likewise. Default sha256.")
@click.option(
    "--format", "delta_format", type=click.Choice(["2", "1"]), help="Likewise. Default 2; 1 is the original's."
)
@click.option(
    "--compression",
    type=click.Choice(list(codec.LEVELS)),
    default="gzip",
    show_default=True,
    help="Of this generation; those of one chain may differ.",
)
@click.option("--level", type=int, help="gzip 1-9 (default 2), zstd 1-19 (default 1).")
@click.option("--full", is_flag=True, help="Store every block, in the same chain. All options above may then change.")
@click.option(
    "--chain",
    "period",
    type=click.Choice(["monthly", "weekly", "daily"]),
    help="Begin a new chain NAME-DATE each period.",
)
@click.option("--transport", "via", type=click.Choice(list(transport.NAMES)), help="Default ssh, if it is installed.")
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE", help="As for ssh -o.")
@click.option("--bwlimit", type=ByteSize(), help="The most that the host may send in a second.")
@click.option(
    "--streams", type=click.IntRange(1, 16), default=1, show_default=True, help="Connections to read through."
)
@click.option("--lvm", is_flag=True, help="Read logical volumes through snapshots.")
@click.option("--snapshot-size", type=SnapshotSize(), help="Of a thick snapshot, or % of its volume. Default 20%.")
@click.option("--mysql", metavar="URL", help="Lock this database for the snapshots: mysql://USER@HOST/, or ssh.")
@click.option(
    "--lock-wait", type=SECONDS, metavar="SECONDS", help="Give up without the lock after this long. Default 30."
)
@click.option("--long-query", type=SECONDS, metavar="SECONDS", help="Wait for statements older than this. Default 60.")
@click.option(
    "--max-hold", type=SECONDS, metavar="SECONDS", help="The database releases the lock after this long. Default 60."
)
@click.option("--replica-pause", is_flag=True, help="Stop a replica's SQL thread for the snapshots.")
@click.option(
    "--before",
    metavar="COMMAND",
    help="Run on the host before the snapshots are made; without --lvm, before reading.",
)
@click.option("--after", metavar="COMMAND", help="Run on the host afterwards, even if the run fails.")
@click.option(
    "--also", multiple=True, metavar="NAME=PATH", help="One more volume of the host, in the same run. Repeatable."
)
@click.option("--keep-snapshot", is_flag=True, help="Thin volumes: read only what changed since the last run.")
@click.option("--audit", is_flag=True, help="With --keep-snapshot: read everything, and prove that nothing was missed.")
@click.option("--mounted", is_flag=True, help="Refuse a NAME on the root file system: the disk is not mounted.")
@click.option("--dry-run", is_flag=True, help="Check everything, say what the run would do, and change nothing.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line on success, and notes: for logs.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON, with --also a list of them.")
def command(name: str, source: str, **given: "Unpack[CommandLine]") -> None:
    """Add a generation of SOURCE to the chain NAME.

    NAME is a path such as /var/backup/web1-disk. SOURCE is a path here, [user@]host:/path or
    ssh://[user@]host[:port]/path: a regular file or a block device, with --lvm a logical volume.

    \b
    Examples:
      blockdiff backup /var/backup/web1 root@web1:/srv/web1.img
      blockdiff backup /var/backup/vm7 root@kvm1:/dev/vg/vm7 --lvm --chain monthly
      blockdiff backup /var/backup/db root@db:/dev/vg/db --lvm --mysql ssh

    \b
    SIZE is one of:
      65536               bytes
      64K, 64KB, 64KiB    64 x 1024 bytes; M, G and T likewise, in either case
      20%                 of the volume: --snapshot-size only
    """
    where, prefix, dry_run, as_json = address.parse(source), agent_prefix(), given["dry_run"], given["as_json"]
    _refuse_together(given)
    if where.host is None and (given["via"] is not None or given["ssh_options"]):
        say(f"note: {printable(source)} is on this machine: --transport and --ssh-option change nothing")
    suffix = _period_suffix(given["period"])
    sources = [(name, where.path), *(_split_also(text) for text in given["also"])]
    targets = [(each + suffix, path) for each, path in sources]
    for target, _path in targets:
        address.check_name(target)
    if given["mounted"]:
        _refuse_root_file_system([each for each, _path in targets])
    with _begun(where, prefix, given) as begun:
        from blockdiff import backup  # here: these imports take as long as the agent does to begin
        from blockdiff.cli.backupoptions import options

        asked = options(given, suffix, prefix)
        if dry_run:
            _rehearse(targets, where, asked, begun[0], as_json)
            return
        with watched(os.path.basename(name + suffix)) as progress:
            results = backup.backup_together(targets, where, asked, progress, begun)
    for result in results:
        _report(result, as_json, given["verbose"])
    for warning in dict.fromkeys(warning for result in results for warning in result.warnings):
        say(f"warning: {warning}")
    if as_json:
        _print_json([_summary(result) for result in results])
    if any(result.warnings for result in results):
        sys.exit(EXIT_WARNING)


def _refuse_together(given: "CommandLine") -> None:
    """Raise `UsageError` for options that do not go together."""
    if given["also"] and not given["lvm"]:
        raise UsageError("--also needs --lvm: only snapshots give several sources one moment")
    if given["streams"] > 1 and given["keep_snapshot"]:
        raise UsageError("--streams cannot be combined with --keep-snapshot: it is for runs that read everything")
    if given["streams"] > 1 and (given["before"], given["after"]) != (None, None) and not given["lvm"]:
        raise UsageError(
            "--streams cannot be combined with --before and --after without --lvm: only one connection waits for them"
        )


@contextmanager
def _begun(where: Address, prefix: list[str] | None, given: "CommandLine") -> Iterator[list[Connection]]:
    """Yield the connections of a run that are begun at once; of several, those that the host accepted."""
    # those of more streams would have to wait for a snapshot, for as long as a database takes: they come later then
    count = 1 if given["lvm"] or given["dry_run"] else given["streams"]
    with ExitStack() as stack:

        def begin(_number: int) -> Connection | None:
            try:
                return stack.enter_context(transport.begin(where, given["via"], given["ssh_options"], prefix or ()))
            except UnreachedError:
                if count == 1:
                    raise
                return None  # the run tries again

        opened = pipeline.in_order(begin, range(count), workers=count, ahead=count)
        yield [connection for connection in opened if connection is not None]


def _refuse_root_file_system(names: list[str]) -> None:
    """Raise `StorageError` before anything is written if the disk of one of the chains is not mounted."""
    from blockdiff.chain.durable import Directory

    for name in names:
        with Directory(os.path.dirname(name) or ".", is_written=True) as directory:
            directory.refuse_root_file_system()


def _split_also(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path.startswith("/")):
        raise UsageError(f"--also {printable(text, 200)} is not NAME=/PATH", "NAME as for the first volume")
    return name, path


def _print_json(summaries: list[dict[str, object]]) -> None:
    """Print what there is to say of each chain of the run: with --also a list."""
    click.echo(json.dumps(summaries if len(summaries) > 1 else summaries[0], indent=1))


def _rehearse(
    targets: list[tuple[str, str]], where: Address, options: "Options", begun: Connection, as_json: bool
) -> None:
    """Print what the run would do with each of its chains."""
    from blockdiff import backup
    from blockdiff.format.manifest import Source

    plans = backup.rehearse(targets, where, options, begun)
    found = [(name, Source(where.machine, path, ""), plan) for (name, path), plan in zip(targets, plans)]
    if as_json:
        _print_json([_plan_summary(*each) for each in found])
    for each in () if as_json else found:
        _report_plan(*each)


def _summary(result: "Result") -> dict[str, object]:
    notes = result.recovered + result.planned + result.notes
    return {"name": result.name, **asdict(result.manifest), "warnings": result.warnings, "notes": notes}


def _report(result: "Result", as_json: bool, verbose: bool) -> None:
    """Say how it went: nothing if all is well and nobody watches, so that cron mails only what matters."""
    for note in (*result.recovered, *result.planned):
        say(f"note: {note}")
    if sys.stderr.isatty() or verbose:
        for note in result.notes:
            say(f"note: {note}")
    if (sys.stdout.isatty() or verbose) and not as_json:
        made = result.manifest
        kind = "full" if made.full else f"{made.changed_blocks} of {made.blocks} blocks changed"
        stored = shown_size(made.delta.size + made.table.size)
        name = printable(result.name)
        click.echo(f"{name}: generation {made.generation}: {kind}, {stored} stored, {made.consistency}")


def _plan_summary(name: str, source: "Source", plan: "Plan") -> dict[str, object]:
    """Return what a run would add to a chain, in the words of a manifest."""
    return {
        "name": name,
        "generation": plan.number,
        "parent": None if plan.parent is None else asdict(plan.parent),
        "full": plan.old is None,
        "delta_format": plan.delta_format,
        "digest": plan.digest,
        "block_size": plan.block_size,
        "source": {"host": source.host, "path": source.path},
        "notes": plan.notes,
    }


def _report_plan(name: str, source: "Source", plan: "Plan") -> None:
    kind = "full" if plan.old is None else f"incremental on generation {plan.number - 1}"
    how = f"{plan.digest}, blocks of {shown_size(plan.block_size)}, format {plan.delta_format}"
    click.echo(
        f"would be done: generation {plan.number} of {printable(name)}, {kind}, of {printable(str(source))}: {how}"
    )
    for note in plan.notes:
        say(f"note: {note}")


def _period_suffix(period: str | None) -> str:
    """Return what --chain appends to NAME: the month, ISO week or day of the local time."""
    formats = {None: "", "monthly": "-%Y%m", "weekly": "-%GW%V", "daily": "-%Y%m%d"}
    return datetime.now().strftime(formats[period])
