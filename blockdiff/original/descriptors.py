"""The original's descriptor protocol: a delta on standard output, digest tables on descriptors 5 and 6.

Deltas are of version 1 and digests MD5, whatever reads or writes the other end.
"""

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from blockdiff import dump
from blockdiff.chain import temporary
from blockdiff.format import codec
from blockdiff.format.deltafile import Sink
from blockdiff.format.deltawriter import DeltaWriter
from blockdiff.format.digesttable import TableReader
from blockdiff.format.lzop import LzopWriter
from blockdiff.host import witness
from blockdiff.original.pipes import FdInput, FdSink, patiently
from blockdiff.quiesce import CommandQuiesce, Quiesce
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.session import Session
from blockdiff.shared.blocks import Hasher, check_block_size, digest_named
from blockdiff.shared.errors import SourceError, UsageError, printable
from blockdiff.shared.pipeline import BufferPool
from blockdiff.shared.runs import Run, batch_size
from blockdiff.transport.address import Address

DEFAULT_BLOCK_SIZE = 16384

DELTA_FD = 1
OLD_TABLE_FD = 5
NEW_TABLE_FD = 6

_MD5 = digest_named("md5")
_COPY_SIZE = 1 << 20
_FLAGS = {"gzip": " --gzip", "lzop": " --lzop", "none": ""}


class PipeSource(dump.Image):
    """An image that can only be read from its beginning to its end: a pipe, or what standard input is.

    `size` is None until the end was reached.
    """

    def __init__(self, fd: int, pool: BufferPool) -> None:
        self._fd = fd
        self._pool = pool
        self.size: int | None = None

    def pieces(self, block_size: int) -> Iterator[dump.Piece]:
        """Yield the image as pieces of whole blocks with their bytes; raises `SourceError` if reading fails."""
        step = batch_size(block_size)
        offset = 0
        while self.size is None:
            buffer = self._pool.get()
            done = 0
            while done < step:
                try:
                    count = patiently(partial(os.readv, self._fd, [buffer[done:step]]), readable=[self._fd])
                except OSError as error:
                    raise SourceError(f"cannot read the input at offset {offset + done}: {error.strerror}") from error
                if count == 0:
                    self.size = offset + done
                    break
                done += count
            if done:
                yield dump.Piece(offset, done, buffer=buffer)
            offset += done

    def fill(self, piece: dump.Piece, buffer: memoryview) -> None:
        """Nothing to do: `pieces` has read it."""


class _Protocol:
    """Both ends of one dump: the old table, if there is one, and where delta and new table go. A context manager."""

    def __init__(self, block_size: int | None, compression: str) -> None:
        self._stack = ExitStack()
        self._compression = compression
        self._asked_block_size = block_size

    def __enter__(self) -> "_Protocol":
        hint = f"add {NEW_TABLE_FD}> NAME.md5 > NAME, or run this through blockdiff_backup"
        check_given(NEW_TABLE_FD, os.O_WRONLY, "the new digest table has no output", hint)
        check_given(DELTA_FD, os.O_WRONLY, "the delta has no output", hint)
        with self._stack as stack:
            self.old = stack.enter_context(_old_table()) if _access(OLD_TABLE_FD) is not None else None
            self.block_size = self.old.block_size if self.old is not None else self._block_size()
            self._table = FdSink(NEW_TABLE_FD, "new digest table")
            self._delta: FdSink | LzopWriter = FdSink(DELTA_FD, "delta")
            if self._compression == "lzop":
                self._delta = stack.enter_context(LzopWriter(DELTA_FD))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _block_size(self) -> int:
        size = DEFAULT_BLOCK_SIZE if self._asked_block_size is None else self._asked_block_size
        check_block_size(size)
        return size

    def writer(self, image_size: int | None) -> DeltaWriter:
        """Return what turns runs into the delta and the new table."""
        compress = codec.compressor("gzip" if self._compression == "gzip" else "none")
        hasher = Hasher(_MD5, self.block_size)
        delta: Sink = self._delta
        return DeltaWriter(delta, self._table, 1, hasher, image_size, compress, self.old)

    def finish(self) -> None:
        """Make sure that everything arrived where it was written to."""
        self._delta.finish()
        self._table.finish()


class _InOrder(dump.OldDigests):
    """The digests of a table, one after the other."""

    def __init__(self, table: TableReader) -> None:
        self._table = table
        self._next = 0

    def read(self, count: int) -> bytes:
        """See `OldDigests`."""
        self._next += count
        return self._table.digests(self._next - count, count)

    def skip(self, count: int) -> None:
        """See `OldDigests`."""
        self._next += count


def dump_local(path: str | None, block_size: int | None, compression: str) -> str:
    """Dump the file or device at `path`, or standard input for None.

    Returns how it was written to while it was read, or in use, in words that follow its path; "" for neither.
    `compression` is ``gzip``, ``lzop`` or ``none``; `block_size` in bytes counts only if there is no old table.
    Raises `SourceError`, `StorageError`, `UsageError`, or `DamagedError` for an old table that cannot be one.
    """
    if path is None:
        check_given(0, os.O_RDONLY, "there is no image to read", "name a FILE, or add < FILE")
    with _Protocol(block_size, compression) as ends, ExitStack() as stack:
        pool = BufferPool(batch_size(ends.block_size))
        source: dump.FileSource | PipeSource
        source = PipeSource(0, pool) if path is None else _open_source(path, pool, stack)
        watched = witness.Witness(source) if isinstance(source, dump.FileSource) else None
        old = _InOrder(ends.old) if ends.old is not None else None
        with ends.writer(source.size) as writer:
            for batch in dump.scan(source, Hasher(_MD5, ends.block_size), pool, old):
                for run in batch.runs:
                    writer.add(_kept(run, writer))
            writer.image_size = source.size
            writer.finish()
        ends.finish()
        return watched.look().how if watched is not None else ""


def dump_remote(
    host: Address, path: str, block_size: int | None, compression: str, prefix: list[str] | None = None
) -> str:
    """Dump the file or device at `path` on a host, through the agent; see `dump_local`.

    `prefix` is a command to run the agent under, None for low priority.
    """
    with _Protocol(block_size, compression) as ends, Session(host, prefix=prefix or ()) as session:
        session.prepare(RunRequest([SourceRequest(os.fsencode(path))], low_priority=prefix is None))
        Quiesce().around(session)
        _scan(session, ends)
        ends.finish()
        return session.totals.how


@dataclass(frozen=True)
class SnapshotOptions:
    """How a snapshot is taken: its size (``""``: 10G, or what is free), and around which command, if any.

    `say` gets what happens, in the original's words.
    """

    snapshot_size: str
    lock: str | None
    say: Callable[[str], None]


def dump_volume(
    host: Address,
    path: str,
    block_size: int | None,
    compression: str,
    options: SnapshotOptions,
    prefix: list[str] | None = None,
) -> None:
    """Dump the logical volume at `path` on a host through a snapshot; the rest is as for `dump_remote`.

    Raises `ProcessError` if the command around it fails.
    """
    say = options.say
    with _Protocol(block_size, compression) as ends, Session(host, prefix=prefix or ()) as session:
        wanted = [SourceRequest(os.fsencode(path))]
        ready = session.prepare(RunRequest(wanted, options.snapshot_size, low_priority=prefix is None))
        for note in ready.notes:
            say(note)
        say("creating snapshot...")
        (CommandQuiesce(options.lock) if options.lock else Quiesce()).around(session)
        command = "ssh_blockdiff_dump" + _FLAGS[compression]
        snapshot = _scan(session, ends, lambda device: say(f'running: {command} "{host.login}" "{device}"...'))
        say(f"removing snapshot {snapshot}...")
        for note in session.totals.notes[len(ready.notes) :]:
            say(note)
        ends.finish()


def _scan(session: Session, ends: _Protocol, opened: Callable[[str], None] = lambda device: None) -> str:
    """Write what the agent finds to have changed in the one source of the session, and check that it ends well.

    Returns the device that was read.
    """
    session.check_digest(_MD5)
    scan = ScanRequest(ends.block_size, _MD5, ends.old)
    source = session.scan(scan)
    opened(source.path)
    with ends.writer(source.size) as writer:
        for run in session.changes(scan, source.size, writer.allocate):
            writer.add(run)
        writer.finish()
    session.finish()
    return source.path


def check_given(fd: int, flags: int, missing: str, hint: str) -> None:
    """Raise `UsageError` unless the caller opened the descriptor in this direction (`os.O_RDONLY`, `os.O_WRONLY`).

    `missing` says what becomes of it, `hint` how to give it.
    """
    if _access(fd) not in (flags, os.O_RDWR):
        way = "reading" if flags == os.O_RDONLY else "writing"
        raise UsageError(f"descriptor {fd} is not open for {way}: {missing}", hint)


def _access(fd: int) -> int | None:
    """Return for what the caller opened a descriptor, None if it is closed: what we opened is not inheritable."""
    try:
        if not os.get_inheritable(fd):
            return None
        return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    except OSError:
        return None


def _old_table() -> TableReader:
    """Return the old digest table as a file of our own: the descriptor may be a pipe."""
    given = FdInput(OLD_TABLE_FD, f"descriptor {OLD_TABLE_FD}")
    with temporary.UnnamedFile() as copy:
        while data := given.read(_COPY_SIZE):
            copy.write(data)
        return TableReader(os.dup(copy.fileno()), f"the digest table on descriptor {OLD_TABLE_FD}", _MD5.size)


def _open_source(path: str, pool: BufferPool, stack: ExitStack) -> dump.FileSource | PipeSource:
    """Return the source at `path`; pipes, and empty files as the original allows them, are read as pipes are."""
    try:
        status = os.stat(path)
        is_pipe = stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)
        if not is_pipe and (status.st_size or not stat.S_ISREG(status.st_mode)):
            return stack.enter_context(dump.FileSource(os.fsencode(path)))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"cannot open {printable(path)}: {error.strerror}") from error
    stack.callback(os.close, fd)
    return PipeSource(fd, pool)


def _kept(run: Run, writer: DeltaWriter) -> Run:
    """Return the run with its bytes in the writer's room: those of the scan are overwritten by its next batch."""
    if run.data is None:
        return run
    room = writer.allocate(run.length)
    room[:] = run.data
    return Run(run.offset, run.length, room)
