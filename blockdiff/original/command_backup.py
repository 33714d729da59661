"""Add a generation that some command made: any program that speaks the original's descriptor protocol."""

import fcntl
import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blockdiff import __version__, merge
from blockdiff.chain import clock
from blockdiff.chain.clock import now
from blockdiff.chain.commit import LockedChain, NewGeneration
from blockdiff.chain.generations import Generation
from blockdiff.format import codec
from blockdiff.format.deltafile import DeltaReader
from blockdiff.format.digesttable import PART_BLOCKS, TableReader
from blockdiff.format.manifest import Manifest, Parent, Source
from blockdiff.original.descriptors import DELTA_FD, NEW_TABLE_FD, OLD_TABLE_FD
from blockdiff.restore import inuse
from blockdiff.shared import process, signals
from blockdiff.shared.blocks import Hasher, block_count, digest_named
from blockdiff.shared.errors import ChainError, DamagedError, ProcessError, printable

_DIGEST = "md5"
#: How often to check whether what a command left running has ended, in seconds.
_LOOK_S = 0.05


@dataclass(frozen=True)
class _Findings:
    """What a command's output holds; `image_size` in bytes is None if it cannot be known from it."""

    delta_format: int
    block_size: int
    blocks: int
    changed_blocks: int
    image_size: int | None


def backup_with_command(name: str, command: Sequence[str], compression: str) -> tuple[int, list[str]]:
    """Run `command` and add what it wrote to the chain `name`; return the generation's number and notes.

    The command may take as long as it likes. What it wrote is read again before it counts: the delta must be complete,
    its blocks must match the new digest table, and all others the old one. Raises `ProcessError` if the command
    fails, `DamagedError` if its output is not consistent; the chain is then as it was.
    """
    with ExitStack() as stack:
        chain = stack.enter_context(LockedChain(name))
        started = now()
        last = chain.last()
        base = chain.generation(last) if last else None
        old = stack.enter_context(_old_table(base)) if base is not None else None
        with signals.held():  # a signal waits until what removes its files knows them
            new = stack.enter_context(chain.begin(codec.SUFFIXES[compression], "." + _DIGEST))
        _run(command, new, base)
        new.delta.read_back()
        new.table.read_back()
        found = _check(new, old, compression)
        delta, table = new.stored()
        manifest = Manifest(
            chain=chain.chain_id(),
            generation=new.number,
            parent=Parent(last, base.manifest_sha256) if base is not None else None,
            full=found.changed_blocks == found.blocks,
            delta_format=found.delta_format,
            delta=delta,
            table=table,
            digest=_DIGEST,
            block_size=found.block_size,
            image_size=_image_size(found, base),
            blocks=found.blocks,
            changed_blocks=found.changed_blocks,
            source=Source(None, os.path.basename(command[0]), "command"),  # its arguments may hold a password
            consistency="unknown",
            started=started,
            finished=now(),
            versions={"blockdiff": __version__},
        )
        new.commit(manifest)
        before = base.manifest.finished if base is not None and base.manifest is not None else None
        why = clock.went_back(manifest.started, manifest.finished, before)
        return new.number, [*chain.notes, *([] if why is None else [f"generation {new.number}: {why}"])]


def _old_table(base: Generation) -> TableReader:
    if base.digest != _DIGEST:
        raise ChainError(
            f"{base.path(base.table_suffix)} is not an MD5 table, the only kind in the descriptor protocol",
            "continue this chain with `blockdiff backup`, or use another NAME",
        )
    base.check_files()
    return base.open_table()


def _run(command: Sequence[str], new: NewGeneration, base: Generation | None) -> None:
    """Run the command with the protocol's descriptors, and nothing else of ours."""
    with ExitStack() as stack:
        descriptors = {DELTA_FD: new.delta.fileno(), NEW_TABLE_FD: new.table.fileno()}
        if base is not None:
            descriptors[OLD_TABLE_FD] = base.directory.open(base.name(base.table_suffix))
            stack.callback(os.close, descriptors[OLD_TABLE_FD])
        # out of the way of the numbers that they are about to get
        moved = {number: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for number, fd in descriptors.items()}
        for fd in moved.values():
            stack.callback(os.close, fd)

        def place() -> None:
            for number, fd in moved.items():
                os.dup2(fd, number)

        def start() -> "subprocess.Popen[bytes]":
            passed = [number for number in moved if number > 2]
            try:
                return subprocess.Popen(list(command), pass_fds=passed, preexec_fn=place)
            except (OSError, subprocess.SubprocessError) as error:
                raise ProcessError(f"cannot run {printable(command[0])}: {error}", "is it on the PATH?") from error

        with process.started(start) as child:
            status = child.wait()
    if status != 0:
        raise ProcessError(f"{printable(command[0])} {process.status_text(status)}; the chain is as it was")
    _refuse_writers(command, new)


def _refuse_writers(command: Sequence[str], new: NewGeneration) -> None:
    """Raise `ProcessError` if what the command left running could still change what it wrote."""
    deadline = time.monotonic() + process.LINGER_S
    while writers := inuse.writers_of_files([new.delta.path, new.table.path]):
        if time.monotonic() > deadline:
            raise ProcessError(
                f"{printable(command[0])} ended, but its output is still open: {writers[0]}; the chain is as it was",
                f"wait until that has ended, or close its standard output and descriptor {NEW_TABLE_FD}",
            )
        time.sleep(_LOOK_S)


def _check(new: NewGeneration, old: TableReader | None, compression: str) -> _Findings:
    """Compare delta, new table and old table with each other; raises `DamagedError`."""
    with ExitStack() as stack:
        table = stack.enter_context(new.open_table(digest_named(_DIGEST).size))
        file = stack.enter_context(os.fdopen(os.dup(new.delta.fileno()), "rb", buffering=0))
        file.seek(0)
        where = "the delta that the command wrote"
        reader = stack.enter_context(DeltaReader(codec.decompressed(file, where, compression), where))
        if reader.block_size != table.block_size:
            raise DamagedError(f"{where} has blocks of {reader.block_size} bytes, its table of {table.block_size}")
        checked = end = 0
        hasher = Hasher(digest_named(_DIGEST), reader.block_size)
        for run, digests in merge.digested(reader.runs(), hasher):
            first, count = run.offset // reader.block_size, block_count(run.length, reader.block_size)
            _check_kept(table, old, checked, first)
            if table.digests(first, count) != digests:
                raise DamagedError(f"{where} does not match the new digest table at offset {first * table.block_size}")
            checked, end = first + count, run.offset + run.length
        _check_kept(table, old, checked, table.count)
        if checked > table.count or reader.table_sha256 not in (None, table.sha256()):
            raise DamagedError(f"{where} and the new digest table do not belong together")
        size = reader.image_size
        if size is None and reader.blocks_carried and checked == table.count:
            size = end
        return _Findings(reader.format, reader.block_size, table.count, reader.blocks_carried, size)


def _check_kept(table: TableReader, old: TableReader | None, first: int, stop: int) -> None:
    """Blocks that the delta does not carry must have the digests that they had."""
    for start in range(first, stop, PART_BLOCKS):
        count = min(PART_BLOCKS, stop - start)
        known = old.digests(start, count) if old is not None and old.block_size == table.block_size else b""
        if table.digests(start, count) != known:
            raise DamagedError(
                f"the delta that the command wrote lacks blocks from offset {first * table.block_size} on, "
                "which are new or have other digests than before"
            )


def _image_size(found: _Findings, base: Generation | None) -> int | None:
    """Return the image's size: if the last block did not change, what the chain knows of it."""
    if found.image_size is not None:
        return found.image_size
    known = base.manifest if base is not None else None
    if known is None or known.block_size != found.block_size:
        return None
    if known.blocks == found.blocks:
        return known.image_size
    return found.blocks * found.block_size if known.blocks > found.blocks else None
