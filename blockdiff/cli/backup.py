"""``blockdiff backup``: one run, which adds a generation to a chain, or to several."""

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING

import click

from blockdiff import address, codec, pipeline, transport
from blockdiff.blocks import DIGEST_SIZES, shown_size
from blockdiff.cli import SECONDS, ByteSize, agent_prefix, say, watched
from blockdiff.errors import EXIT_WARNING, UsageError, printable
from blockdiff.transport.connection import Connection

if TYPE_CHECKING:
    from blockdiff.backup import Result


@click.command("backup")
@click.argument("name")
@click.argument("source")
@click.option("--block-size", type=ByteSize(), help="Bytes of a block. Default 64K; a chain keeps its own.")
@click.option("--digest", type=click.Choice(list(DIGEST_SIZES)), help="Default sha256; a chain keeps its own.")
@click.option("--compression", type=click.Choice(list(codec.LEVELS)), default="gzip", show_default=True)
@click.option("--level", type=int, help="gzip 1-9 (default 2), zstd 1-19 (default 1).")
@click.option("--format", "delta_format", type=click.Choice(["2", "1"]), help="Default 2; 1 is the original's.")
@click.option("--full", is_flag=True, help="Store every block, inside the chain.")
@click.option(
    "--chain",
    "period",
    type=click.Choice(["monthly", "weekly", "daily"]),
    help="Begin a new chain NAME-DATE each period.",
)
@click.option(
    "--transport", "via", type=click.Choice(list(transport.NAMES)), help="Default ssh, where it is installed."
)
@click.option("--ssh-option", "ssh_options", multiple=True, metavar="KEY=VALUE", help="As for ssh -o.")
@click.option("--bwlimit", type=ByteSize(), help="Bytes a second that the host may send at most.")
@click.option(
    "--streams", type=click.IntRange(1, 16), default=1, show_default=True, help="Connections to read through."
)
@click.option("--lvm", is_flag=True, help="Read logical volumes through snapshots.")
@click.option("--snapshot-size", metavar="SIZE", help="Of a thick snapshot: bytes, or % of the volume. Default 20%.")
@click.option("--mysql", metavar="URL", help="Lock this database meanwhile: mysql://USER@HOST/, or ssh.")
@click.option("--lock-wait", type=SECONDS, metavar="SECONDS", help="Give up a lock after this long. Default 30.")
@click.option("--long-query", type=SECONDS, metavar="SECONDS", help="Wait for statements older than this. Default 60.")
@click.option("--max-hold", type=SECONDS, metavar="SECONDS", help="The database ends the lock by itself. Default 60.")
@click.option("--before", metavar="COMMAND", help="Run on the host before the snapshots are made.")
@click.option("--after", metavar="COMMAND", help="Run on the host after that, whatever happens.")
@click.option("--also", multiple=True, metavar="NAME=PATH", help="One more volume, at the same moment. Repeatable.")
@click.option("--keep-snapshot", is_flag=True, help="Thin volumes: read only what changed since the last run.")
@click.option("--audit", is_flag=True, help="With --keep-snapshot: read everything, and prove that nothing was missed.")
@click.option("--mounted", is_flag=True, help="Refuse a NAME on the root file system: the disk is not mounted.")
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON, with --also a list of them.")
def command(
    name: str,
    source: str,
    block_size: int | None,
    digest: str | None,
    compression: str,
    level: int | None,
    delta_format: str | None,
    full: bool,
    period: str | None,
    via: str | None,
    ssh_options: tuple[str, ...],
    bwlimit: int | None,
    streams: int,
    also: tuple[str, ...],
    mounted: bool,
    as_json: bool,
    **volumes: object,
) -> None:
    """Add a generation of SOURCE to the chain NAME.

    NAME is a path such as /var/backup/web1-disk. SOURCE is /path, [user@]host:/path or
    ssh://[user@]host[:port]/path: a regular file or a block device, with --lvm a logical volume.
    """
    where, prefix = address.parse(source), agent_prefix()
    if also and not volumes["lvm"]:
        raise UsageError("--also needs --lvm: without snapshots there is no one moment for several sources")
    if streams > 1 and volumes["keep_snapshot"]:
        raise UsageError("--streams is for runs that read everything, --keep-snapshot for those that need not")
    suffix = _period_suffix(period)
    targets = [(each + suffix, path) for each, path in [(name, where.path), *(_split_also(text) for text in also)]]
    if mounted:
        _refuse_root_file_system([each for each, _path in targets])
    with ExitStack() as stack:

        def begin(_number: int) -> Connection:
            return stack.enter_context(transport.begin(where, via, ssh_options, prefix or ()))

        # those of more streams would have to wait for a snapshot, for as long as a database takes: they come later then
        count = 1 if volumes["lvm"] else streams
        begun = list(pipeline.in_order(begin, range(count), workers=count, ahead=count))
        from blockdiff import backup  # here: these imports take as long as the agent does to begin
        from blockdiff.cli.volumes import volume_options

        options = backup.Options(
            block_size=block_size,
            digest=digest,
            delta_format=int(delta_format) if delta_format else None,
            full=full,
            volumes=volume_options(volumes),
            period=suffix,
            compression=compression,
            level=level,
            transport=via,
            ssh_options=ssh_options,
            bandwidth=bwlimit,
            streams=streams,
            prefix=prefix,
        )
        with watched(os.path.basename(name + suffix)) as progress:
            results = backup.backup_together(targets, where, options, progress, begun)
    for result in results:
        _report(result, as_json)
    if as_json:
        summaries = [_summary(result) for result in results]
        click.echo(json.dumps(summaries if also else summaries[0], indent=1))
    if any(result.warnings for result in results):
        sys.exit(EXIT_WARNING)


def _refuse_root_file_system(names: list[str]) -> None:
    """Raise `StorageError` before anything is written where the disk of one of the chains is not mounted."""
    from blockdiff.durable import Directory

    for name in names:
        with Directory(os.path.dirname(name) or ".", is_written=True) as directory:
            directory.refuse_root_file_system()


def _split_also(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path.startswith("/")):
        raise UsageError(f"--also {printable(text, 200)} is not NAME=/PATH", "NAME as for the first volume")
    return name, path


def _summary(result: "Result") -> dict[str, object]:
    notes = result.recovered + result.notes
    return {"name": result.name, **asdict(result.manifest), "warnings": result.warnings, "notes": notes}


def _report(result: "Result", as_json: bool) -> None:
    for note in result.recovered:
        say(f"note: {note}")
    if sys.stderr.isatty():
        for note in result.notes:
            say(f"note: {note}")
    if sys.stdout.isatty() and not as_json:
        made = result.manifest
        kind = "full" if made.full else f"{made.changed_blocks} of {made.blocks} blocks changed"
        click.echo(f"generation {made.generation}: {kind}, {shown_size(made.delta.size + made.table.size)} stored")
    for warning in result.warnings:
        say(f"warning: {warning}")


def _period_suffix(period: str | None) -> str:
    """Return what --chain appends to NAME: the month, ISO week or day of the local time."""
    formats = {None: "", "monthly": "-%Y%m", "weekly": "-%GW%V", "daily": "-%Y%m%d"}
    return datetime.now().strftime(formats[period])
