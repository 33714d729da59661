"""The `blockdiff` command: backup and list; the others have modules of their own, imported when they are asked for."""

import json
import os
import sys
from dataclasses import asdict
from datetime import datetime
from importlib import import_module

import click

from blockdiff import __version__, address, backup, codec, coordinates, listing, transport
from blockdiff.blocks import DIGEST_SIZES
from blockdiff.chain import Chain, Generation
from blockdiff.cli import SECONDS, ByteSize, agent_prefix, run, say, split_name, watched
from blockdiff.cli.volumes import volume_options
from blockdiff.errors import EXIT_DAMAGED, EXIT_WARNING, ChainError, UsageError, printable


class _Commands(click.Group):
    """The commands; those that a backup has no use for cost it nothing."""

    _LATER = ("authorize", "repair", "restore", "status", "verify")

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return all names."""
        return sorted([*super().list_commands(ctx), *self._LATER])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command by its name."""
        if cmd_name in self._LATER and cmd_name not in self.commands:
            self.add_command(import_module(f"blockdiff.cli.{cmd_name}").command)
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="blockdiff %(version)s")
def cli() -> None:
    """Block-level incremental backups of volumes and disk images, pulled over SSH.

    Exit status: 0 done, 1 failed, 2 usage, 3 done with a warning, 4 chain is busy, 5 backup data damaged.
    """


@cli.command("backup")
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
@click.option("--transport", type=click.Choice(list(transport.NAMES)), help="Default ssh, where it is installed.")
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
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON, with --also a list of them.")
def backup_command(
    name: str,
    source: str,
    block_size: int | None,
    digest: str | None,
    compression: str,
    level: int | None,
    delta_format: str | None,
    full: bool,
    period: str | None,
    transport: str | None,
    ssh_options: tuple[str, ...],
    bwlimit: int | None,
    streams: int,
    also: tuple[str, ...],
    as_json: bool,
    **volumes: object,
) -> None:
    """Add a generation of SOURCE to the chain NAME.

    NAME is a path such as /var/backup/web1-disk. SOURCE is /path, [user@]host:/path or
    ssh://[user@]host[:port]/path: a regular file or a block device, with --lvm a logical volume.
    """
    where = address.parse(source)
    options = backup.Options(
        block_size=block_size,
        digest=digest,
        delta_format=int(delta_format) if delta_format else None,
        full=full,
        volumes=volume_options(volumes),
        period=_period_suffix(period),
        compression=compression,
        level=level,
        transport=transport,
        ssh_options=ssh_options,
        bandwidth=bwlimit,
        streams=streams,
        prefix=agent_prefix(),
    )
    if also and options.volumes is None:
        raise UsageError("--also needs --lvm: without snapshots there is no one moment for several sources")
    if streams > 1 and options.volumes is not None and options.volumes.keep:
        raise UsageError("--streams is for runs that read everything, --keep-snapshot for those that need not")
    targets = [(name, where.path), *(_split_also(text) for text in also)]
    with watched(os.path.basename(name + options.period)) as progress:
        results = backup.backup_together(
            [(each + options.period, path) for each, path in targets], where, options, progress
        )
    for result in results:
        _report(result, as_json)
    if as_json:
        summaries = [_summary(result) for result in results]
        click.echo(json.dumps(summaries if also else summaries[0], indent=1))
    if any(result.warnings for result in results):
        sys.exit(EXIT_WARNING)


def _split_also(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path.startswith("/")):
        raise UsageError(f"--also {printable(text, 200)} is not NAME=/PATH", "NAME as for the first volume")
    return name, path


def _summary(result: backup.Result) -> dict[str, object]:
    notes = result.recovered + result.notes
    return {"name": result.name, **asdict(result.manifest), "warnings": result.warnings, "notes": notes}


def _report(result: backup.Result, as_json: bool) -> None:
    for note in result.recovered:
        say(f"note: {note}")
    if sys.stderr.isatty():
        for note in result.notes:
            say(f"note: {note}")
    if sys.stdout.isatty() and not as_json:
        made = result.manifest
        kind = "full" if made.full else f"{made.changed_blocks} of {made.blocks} blocks changed"
        click.echo(f"generation {made.generation}: {kind}, {_size(made.delta.size + made.table.size)} stored")
    for warning in result.warnings:
        say(f"warning: {warning}")


@cli.command("list")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--replica-statement", is_flag=True, help="Print the statement that makes NAME@N, restored, a replica.")
def list_command(name: str, as_json: bool, replica_statement: bool) -> None:
    """Show the generations of the chain NAME (or NAME@N: one of them)."""
    chain_name, number = split_name(name)
    with Chain(chain_name) as chain:
        if replica_statement:
            click.echo(_replica_statement(chain.generation(number)), nl=False)
            return
        found = listing.entries(chain)
        if not found or number is not None:
            chain.generation(number)  # says what is not there
            found = [entry for entry in found if entry.generation == number]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=1))
    else:
        _print_table(found)
    if any(entry.state in (listing.DAMAGED, listing.MISSING) for entry in found):
        sys.exit(EXIT_DAMAGED)


def _replica_statement(generation: Generation) -> str:
    """Return the statement for a generation; raises `ChainError` where it knows nothing of a database."""
    if generation.manifest_error is not None:
        raise generation.manifest_error
    if generation.manifest is None or generation.manifest.database is None:
        raise ChainError(
            f"generation {generation.number} was made without a database lock, and has no coordinates",
            "use --mysql for backups that replicas are to be seeded from",
        )
    return coordinates.replica_statement(generation.manifest.database)


def _period_suffix(period: str | None) -> str:
    """Return what --chain appends to NAME: the month, ISO week or day of the local time."""
    formats = {None: "", "monthly": "-%Y%m", "weekly": "-%GW%V", "daily": "-%Y%m%d"}
    return datetime.now().strftime(formats[period])


def _size(count: int | None) -> str:
    """Return a number of bytes for people: 1.5G, powers of 1024."""
    if count is None:
        return "-"
    value, unit = float(count), ""
    for unit in ("", "K", "M", "G", "T"):
        if value < 1024 or unit == "T":
            break
        value /= 1024
    return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"


def _when(text: str | None) -> str:
    """Return a time of the manifest in local time."""
    if text is None:
        return "-"
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return printable(text, 40)


def _print_table(found: list[listing.Entry]) -> None:
    kinds = {True: "full", False: "incremental", None: "-"}
    rows = [("gen", "when", "kind", "image", "changed", "stored", "consistency", "state")]
    rows += [
        (
            str(entry.generation),
            _when(entry.when),
            kinds[entry.full],
            _size(entry.image_size),
            _size(entry.changed),
            _size(entry.stored),
            entry.consistency or "-",
            entry.state if entry.problem is None else f"{entry.state}: {entry.problem}",
        )
        for entry in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(7)]
    for row in rows:
        cells = [
            cell.rjust(width) if i in (0, 3, 4, 5) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ]
        click.echo("  ".join([*cells, row[7]]).rstrip())


def main() -> None:
    """The entry point."""
    run(cli, "blockdiff")
