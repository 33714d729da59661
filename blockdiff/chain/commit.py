"""Add to a chain: the lock, what a crash left behind, and the order in which a new generation becomes part of it.

The order of writing is what the safety of a chain rests on: see `NewGeneration.commit` and `docs/architecture.md`.
"""

import errno
import fcntl
import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType

from blockdiff.chain.durable import OutputFile
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import DELTA_SUFFIXES, MANIFEST_SUFFIX, TABLE_SUFFIXES, Inventory
from blockdiff.format import checksum, manifest
from blockdiff.format.digesttable import TableReader
from blockdiff.format.manifest import Manifest
from blockdiff.shared.errors import BusyError, DamagedError, StorageError, UsageError, printable


class WritableChain(Chain):
    """A chain that we may add to, as far as that can be known without a lock: a run's rehearsal looks at it.

    Raises `UsageError` for a NAME that readers would take for a generation of another chain, and `StorageError` if
    others may write to the directory, or we may not.
    """

    is_written = True

    def __init__(self, name: str) -> None:
        if re.search(r"@[0-9]+$", name):
            raise UsageError(f"a NAME cannot end like {printable(name)!r}", "NAME@2 names generation 2 of a chain NAME")
        super().__init__(name)

    def _begin(self) -> None:
        self.directory.refuse_others()
        self.directory.refuse_read_only()


class LockedChain(WritableChain):
    """A chain that this process alone may add to, after what a crash left was repaired.

    Raises what `WritableChain` does, and `BusyError` if another run holds it. `notes` says what was repaired.
    Without `recovers`, what is beyond the last complete generation stays, and so does ``NAME.ver``.
    """

    def __init__(self, name: str, recovers: bool = True) -> None:
        self.notes: list[str] = []
        self._lock_fd = -1
        super().__init__(name)
        try:
            self._set_uncommitted_aside()
            self._remove_temporary()
            self.directory.check_abilities(self._lock_name, self.temporary_version)  # now, not after hours of reading
            if recovers:
                self._recover()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        super()._begin()
        self._lock()

    def _read_inventory(self, inventory: Inventory) -> None:
        super()._read_inventory(inventory)
        self._begun = []  # the lock is ours, and may be new

    def __enter__(self) -> "LockedChain":
        return self

    def close(self) -> None:
        """Release the lock and close the directory."""
        if self._lock_fd >= 0:
            with suppress(OSError):
                # a child that another thread is just starting has the descriptor as well, until its program begins
                fcntl.flock(self._lock_fd, fcntl.LOCK_UN)
            os.close(self._lock_fd)
            self._lock_fd = -1
        super().close()

    def _lock(self) -> None:
        self._lock_fd = self.directory.open_lock(self._lock_name)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(
                    f"cannot lock {self.path_of('.lock')}: {error.strerror}",
                    "keep backups on a file system with flock(2)",
                ) from error
            raise BusyError(
                f"another run is busy with {printable(self.name)}", "wait until it has finished, then run again"
            ) from error

    def _set_uncommitted_aside(self) -> None:
        """Move away what a run linked and died before it linked the manifest: its temporary names say so.

        In a first generation nothing else does: no ``NAME.ver`` says yet that there is no complete generation.
        """
        moved = False
        for generation in list(self.generations.values()):
            for suffix in sorted(generation.suffixes):
                name = generation.name(suffix)
                if MANIFEST_SUFFIX not in generation.suffixes and self.directory.are_same(name, f".{name}.tmp"):
                    self._set_aside(generation, suffix)
                    generation.suffixes.remove(suffix)
                    moved = True
            if not generation.suffixes:
                del self.generations[generation.number]
        if moved:
            self.directory.sync()

    def _remove_temporary(self) -> None:
        # the known suffixes only: .NAME.1.2.tmp belongs to a chain called NAME.1
        suffixes = "|".join(map(re.escape, (*DELTA_SUFFIXES, *TABLE_SUFFIXES, MANIFEST_SUFFIX)))
        pattern = re.compile(re.escape(f".{self.base}.") + rf"(ver|[1-9][0-9]*({suffixes}))\.tmp")
        for name in self.directory.names():
            if pattern.fullmatch(name):
                self.directory.unlink(name)

    def _recover(self) -> None:
        last = self.last()
        if last and last != self.version:
            self.write_version(last)
            self.notes.append(f"{self.path_of('.ver')} was corrected: generation {last} is the last complete one")
        beyond = [generation for number, generation in self.generations.items() if number > last]
        for generation in beyond:
            for suffix in sorted(generation.suffixes):
                self._check_reachable(generation, suffix)
                self._set_aside(generation, suffix)
            del self.generations[generation.number]
        if beyond:
            self.directory.sync()

    def _check_reachable(self, generation: Generation, suffix: str) -> None:
        """Raise `StorageError` if a file cannot be looked at now: its generation may be complete nevertheless."""
        try:
            self.directory.size_of(generation.name(suffix))
        except DamagedError:
            pass  # it is there, and not a file

    def _set_aside(self, generation: Generation, suffix: str) -> None:
        new_name = self.set_aside(generation.name(suffix))
        self.notes.append(f"{generation.path(suffix)} was never completed; it was moved to {new_name}")

    def set_aside(self, name: str) -> str:
        """Rename a file to ``….aside-1``, or the next number that is free, and return that name."""
        taken, count = set(self.directory.names()), 1
        while f"{name}.aside-{count}" in taken:
            count += 1
        self.directory.rename(name, f"{name}.aside-{count}")
        return f"{name}.aside-{count}"

    def replace(self, name: str, write: Callable[[OutputFile], object]) -> None:
        """Give `name` to a new file, durable when it gets it, that `write` writes; what has that name is set aside."""
        temporary = f".{name}.tmp"
        with ExitStack() as stack:
            file = stack.enter_context(self.directory.create(temporary))
            stack.callback(self.directory.unlink, temporary)
            write(file)
            file.finish()
            if self.directory.has(name):
                self.set_aside(name)
            self.directory.link(temporary, name)
            self.directory.sync()

    def write_version(self, number: int) -> None:
        """Let ``NAME.ver`` say that `number` is the last complete generation."""
        try:
            self.prepare_version(number)
            self.publish_version(number)
        except BaseException:
            self.directory.unlink(self.temporary_version)
            raise
        self.directory.sync()

    @property
    def _lock_name(self) -> str:
        return f".{self.base}.lock"

    @property
    def temporary_version(self) -> str:
        """The name under which the next ``NAME.ver`` is written."""
        return f".{self.base}.ver.tmp"

    def prepare_version(self, number: int) -> None:
        """Write the next ``NAME.ver`` under its temporary name."""
        with self.directory.create(self.temporary_version) as file:
            file.write(b"%d\n" % number)
            file.finish(0o600)  # other tools may write to it in place

    def publish_version(self, number: int) -> None:
        """Give the prepared ``NAME.ver`` its name."""
        self.directory.rename(self.temporary_version, f"{self.base}.ver")
        self.version = number

    def chain_id(self) -> str:
        """Return the identifier that the chain's manifests share; a new one if there is no manifest yet."""
        known = [(number, generation.manifest) for number, generation in self.generations.items()]
        newest = max(((n, found.chain) for n, found in known if found is not None), default=None)
        return newest[1] if newest is not None else os.urandom(16).hex()

    def begin(self, delta_suffix: str, table_suffix: str) -> "NewGeneration":
        """Return the next generation, to be written."""
        return NewGeneration(self, self.last() + 1, delta_suffix, table_suffix)


class NewGeneration:
    """A generation that is being written: under temporary names, until it is committed.

    A context manager: without `commit` nothing of it stays.
    """

    def __init__(self, chain: LockedChain, number: int, delta_suffix: str, table_suffix: str) -> None:
        self.number = number
        self._chain = chain
        self._directory = chain.directory
        self._suffixes = (delta_suffix, table_suffix, MANIFEST_SUFFIX)
        self._committed = False
        self._linked: list[str] = []
        self._files: list[OutputFile] = []
        try:
            self.delta = self._create(delta_suffix, checksum.OF_DELTAS)
            self.table = self._create(table_suffix)
        except BaseException:
            self._undo()
            raise

    def __enter__(self) -> "NewGeneration":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo()

    def _create(self, suffix: str, algorithm: str = checksum.OF_OTHERS) -> OutputFile:
        file = self._directory.create(self._temporary(suffix), algorithm)
        self._files.append(file)
        return file

    def _final(self, suffix: str) -> str:
        return f"{self._chain.base}.{self.number}{suffix}"

    def _temporary(self, suffix: str) -> str:
        return f".{self._final(suffix)}.tmp"

    def open_table(self, digest_size: int) -> TableReader:
        """Return the new digest table as it is so far, for reading."""
        return TableReader(os.dup(self.table.fileno()), "the new digest table", digest_size)

    def stored(self) -> tuple[manifest.StoredFile, manifest.StoredFile]:
        """Return what the manifest says of delta and digest table; both are complete and durable from here on."""
        delta_suffix, table_suffix, _ = self._suffixes
        self.delta.finish()
        self.table.finish()
        return (
            manifest.StoredFile(delta_suffix, self.delta.size, self.delta.checksum()),
            manifest.StoredFile(table_suffix, self.table.size, self.table.checksum()),
        )

    def commit(self, content: Manifest) -> None:
        """Make the generation a part of the chain. The link of the manifest is the moment that decides.

        Every content is durable before any name appears, and so are the temporary names, which say what is not
        complete; delta and table have their names before the manifest has, and ``NAME.ver`` follows: whenever the power
        fails, what is found later is complete or not there. What takes room is written before, so that a full disk
        cannot stop a commit halfway.
        """
        delta_suffix, table_suffix, manifest_suffix = self._suffixes
        with self._create(manifest_suffix) as file:
            file.write(content.to_bytes())
            file.finish()
        self._chain.prepare_version(self.number)
        self._directory.sync()
        for suffix in (delta_suffix, table_suffix):
            self._link(suffix)
        self._directory.sync()
        self._link(manifest_suffix)
        self._directory.sync()
        self._committed = True  # before the rename: a signal in between must not undo what NAME.ver may already say
        try:
            self._chain.publish_version(self.number)
        except StorageError:
            self._committed = False
            raise
        self._directory.sync()

    def _link(self, suffix: str) -> None:
        self._directory.link(self._temporary(suffix), self._final(suffix))
        self._linked.append(suffix)

    def _undo(self) -> None:
        """Remove the temporary names, and the final ones that this very object made and did not commit.

        What cannot be removed is left to the next run: the error that brought us here is the one to report.
        """
        for file in self._files:
            file.close()
        if not self._committed:
            for suffix in reversed(self._suffixes):
                self._undo_link(suffix)
        for name in (*map(self._temporary, self._suffixes), self._chain.temporary_version):
            try:
                self._directory.unlink(name)
            except StorageError:
                pass

    def _undo_link(self, suffix: str) -> None:
        # a signal may have come just after the link; and not every file system can see that two names are one file
        try:
            if suffix in self._linked or self._directory.are_same(self._final(suffix), self._temporary(suffix)):
                self._directory.unlink(self._final(suffix))
        except StorageError:
            pass
