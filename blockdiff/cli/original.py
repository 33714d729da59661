"""The commands of the 2010 original under their own names, compatible byte for byte."""

import os
import shlex
import sys

import click

from blockdiff import __version__
from blockdiff.cli.arguments import agent_prefix
from blockdiff.cli.outcome import run
from blockdiff.cli.output import say, say_error
from blockdiff.format import codec
from blockdiff.original.apply import apply
from blockdiff.original.command_backup import backup_with_command
from blockdiff.original.cronlog import run_logged
from blockdiff.original.descriptors import SnapshotOptions, check_given, dump_local, dump_remote, dump_volume
from blockdiff.original.pipes import FdInput
from blockdiff.shared.errors import BlockdiffError, UsageError, printable
from blockdiff.transport import address

#: The original's block size for logical volumes, in bytes.
LVM_BLOCK_SIZE = 1 << 20

_SETTINGS = {"help_option_names": ["-h", "--help"]}
_version = click.version_option(__version__, message="%(version)s")
_gzip = click.option("-z", "--gzip", is_flag=True, help="Compress with gzip.")
_lzop = click.option("--lzop", is_flag=True, help="Compress with lzop, which must be installed here.")


@click.command(context_settings=_SETTINGS)
@click.option("--blocksize", type=int, help="Bytes of a block; default BLOCKSIZE in the environment, or 16384.")
@_gzip
@_lzop
@_version
@click.argument("file", required=False)
def _dump(blocksize: int | None, gzip: bool, lzop: bool, file: str | None) -> None:
    """Write the changed blocks of FILE (default: standard input) to standard output.

    The old digest table is read from descriptor 5, if it is open, and the new one written to descriptor 6:

    blockdiff_dump FILE 5< NAME.1.md5 6> NAME.2.md5 > NAME.2
    """
    unrest = dump_local(file, blocksize if blocksize is not None else _block_size(), _compression(gzip, lzop))
    _warn_of(unrest, file)


@click.command(context_settings=_SETTINGS)
@_version
@click.argument("file")
def _merge(file: str) -> None:
    """Apply the delta on standard input, plain or compressed by gzip, zstd or lzop, to FILE."""
    check_given(0, os.O_RDONLY, "there is no delta to apply", "add < DELTA")
    given = FdInput(0, "the delta on standard input")
    apply(codec.decompressed(given, "the delta on standard input"), file)


@click.command(context_settings={**_SETTINGS, "allow_interspersed_args": False})
@_version
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def _backup(name: str, command: tuple[str, ...]) -> None:
    """Add a generation to the chain NAME: what COMMAND, with its arguments, dumps.

    -z, --gzip or --lzop among the arguments says how COMMAND compresses. VERBOSE in the environment shows it.
    """
    if os.environ.get("VERBOSE"):
        click.echo(f"running: {printable(shlex.join(command))}", err=True)
    gzip, lzop = any(word in ("-z", "--gzip") for word in command), "--lzop" in command
    _number, notes = backup_with_command(name, command, _compression(gzip, lzop))
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo("backup completed successfully", err=True)


@click.command(context_settings=_SETTINGS)
@_gzip
@_lzop
@_version
@click.argument("host", metavar="[USER@]HOST")
@click.argument("file")
def _ssh_dump(gzip: bool, lzop: bool, host: str, file: str) -> None:
    """Write the changed blocks of FILE on HOST to standard output; descriptors as for blockdiff_dump.

    SSH_BLOCKDIFF_PREFIX in the environment is a command that runs the agent, such as `ionice -c3 nice`.
    """
    unrest = dump_remote(address.parse_login(host), file, _block_size(), _compression(gzip, lzop), agent_prefix())
    _warn_of(unrest, f"{host}:{file}")


def _warn_of(unrest: str, source: str | None) -> None:
    """Say how a source was written to or in use: the exit status stays 0, others stand for a dump that failed."""
    if unrest:
        say(f"warning: {printable(source or '')} {unrest}: the dump may not be one point in time")


@click.command(context_settings=_SETTINGS)
@_gzip
@_lzop
@_version
@click.argument("host", metavar="[USER@]HOST")
@click.argument("volume")
def _lvm_dump(gzip: bool, lzop: bool, host: str, volume: str) -> None:
    """Write the changed blocks of the logical VOLUME on HOST to standard output, read through a snapshot.

    Descriptors as for blockdiff_dump. In the environment: LVCREATE_PREFIX, a command that runs here while the snapshot
    is made (it must execute the command after it), such as `mysqllock --host=db00`; SNAPSHOT_SIZE, by default 10G or
    what the volume group has; BLOCKSIZE, by default 1048576; and SSH_BLOCKDIFF_PREFIX as for ssh_blockdiff_dump.
    """
    snapshot_size, lock = os.environ.get("SNAPSHOT_SIZE", ""), os.environ.get("LVCREATE_PREFIX")
    options = SnapshotOptions(snapshot_size, lock, lambda line: click.echo(line, err=True))
    block_size = _block_size() or LVM_BLOCK_SIZE
    dump_volume(address.parse_login(host), volume, block_size, _compression(gzip, lzop), options, agent_prefix())


@click.command(context_settings={**_SETTINGS, "allow_interspersed_args": False})
@click.option("-l", "--logfile", metavar="FILE", help="Append the log to FILE. Without it the log is not kept.")
@click.option("-t", "--timestamp", is_flag=True, help="Put the time in front of each line.")
@click.option("-p", "--print-always", is_flag=True, help="Print this run's log even if COMMAND succeeds.")
@_version
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def _cronlog(logfile: str | None, timestamp: bool, print_always: bool, command: tuple[str, ...]) -> None:
    """Run COMMAND, log what it says, and print this run's log if it fails.

    Exits with the status of COMMAND, or 128+N if signal N ended it. A log that cannot be written does not end
    COMMAND: cronlog says so, and prints the run's log. It does not wait for what COMMAND leaves running.
    """

    def warn(error: BlockdiffError) -> None:
        say_error(error, "warning: ")

    sys.exit(run_logged(command, logfile, timestamp, print_always, sys.stdout.buffer, warn))


def _compression(gzip: bool, lzop: bool) -> str:
    if gzip and lzop:
        raise UsageError("a delta cannot be compressed by both gzip and lzop")
    return "gzip" if gzip else "lzop" if lzop else "none"


def _block_size() -> int | None:
    """Return the block size in the environment, in bytes."""
    value = os.environ.get("BLOCKSIZE")
    if not value:
        return None
    if not value.isascii() or not value.isdigit():
        raise UsageError(f"BLOCKSIZE is {printable(value, 100)!r}, not a number of bytes")
    return int(value)


def blockdiff_dump() -> None:
    """The entry point."""
    run(_dump, "blockdiff_dump")


def blockdiff_merge() -> None:
    """The entry point."""
    run(_merge, "blockdiff_merge")


def blockdiff_backup() -> None:
    """The entry point."""
    run(_backup, "blockdiff_backup")


def ssh_blockdiff_dump() -> None:
    """The entry point."""
    run(_ssh_dump, "ssh_blockdiff_dump")


def ssh_lvm_dump() -> None:
    """The entry point."""
    run(_lvm_dump, "ssh_lvm_dump")


def cronlog() -> None:
    """The entry point."""
    run(_cronlog, "cronlog")
