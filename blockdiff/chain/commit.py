"""Add to a chain: lock it, clean up after a crash, and commit a new generation in a safe order.

The safety of a chain depends on the order of writing: see `NewGeneration.commit` and `docs/architecture.md`.
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
    """A chain that this user may add to, as far as that can be known without the lock. A dry run uses it.

    Raises `UsageError` if readers would mistake NAME for a generation of another chain, and `StorageError` if other
    users can write to the directory, or this user cannot.
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
    """A chain that only this process may add to. It is repaired first if a crash left it incomplete.

    Raises what `WritableChain` raises, and `BusyError` if another run has the lock. `notes` says what was repaired.
    Without `recovers`, ``NAME.ver`` is not corrected, and of the generations after the last complete one only those
    files are set aside whose temporary names show that their commit was cut off.
    """

    def __init__(self, name: str, recovers: bool = True) -> None:
        self.notes: list[str] = []
        self._lock_fd = -1
        super().__init__(name)
        try:
            self._set_uncommitted_aside()
            self._remove_temporary()
            self.directory.check_abilities(self._lock_name, self.temporary_version)  # now, not after the image was read
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
        self._begun = []  # the lock file is of this run, and may be new

    def __enter__(self) -> "LockedChain":
        return self

    def close(self) -> None:
        """Release the lock and close the directory."""
        if self._lock_fd >= 0:
            with suppress(OSError):
                # a child that another thread is starting also has the descriptor, until its program begins
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
        """Set aside the files that a run linked before it died, if it died before it linked the manifest.

        The temporary names of these files, which still exist, show this. If it was the first generation, nothing else
        does: there is no ``NAME.ver`` yet that says which generation is the last complete one.
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
        # only the known suffixes: .NAME.1.2.tmp belongs to a chain called NAME.1
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
        """Raise `StorageError` if a file cannot be reached now: its generation may nevertheless be complete."""
        try:
            self.directory.size_of(generation.name(suffix))
        except DamagedError:
            pass  # something has this name, but it is not a file

    def _set_aside(self, generation: Generation, suffix: str) -> None:
        new_name = self.set_aside(generation.name(suffix))
        self.notes.append(f"{generation.path(suffix)} was never completed; it was moved to {new_name}")

    def set_aside(self, name: str) -> str:
        """Rename a file to ``….aside-1``, or the next free number, and return the new name."""
        taken, count = set(self.directory.names()), 1
        while f"{name}.aside-{count}" in taken:
            count += 1
        self.directory.rename(name, f"{name}.aside-{count}")
        return f"{name}.aside-{count}"

    def replace(self, name: str, write: Callable[[OutputFile], object]) -> None:
        """Let `write` write a new file, make it durable, and give it `name`. An existing file `name` is set aside."""
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
        """Write into ``NAME.ver`` that `number` is the last complete generation."""
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
        """Return the identifier in all of the chain's manifests; a new one if there is no manifest yet."""
        known = [(number, generation.manifest) for number, generation in self.generations.items()]
        newest = max(((n, found.chain) for n, found in known if found is not None), default=None)
        return newest[1] if newest is not None else os.urandom(16).hex()

    def begin(self, delta_suffix: str, table_suffix: str) -> "NewGeneration":
        """Return the next generation, which the caller then writes."""
        return NewGeneration(self, self.last() + 1, delta_suffix, table_suffix)


class NewGeneration:
    """A generation that is being written. Its files have temporary names until it is committed.

    A context manager: without `commit` its files are removed.
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
        """Return the new digest table, as far as it was written, for reading."""
        return TableReader(os.dup(self.table.fileno()), "the new digest table", digest_size)

    def stored(self) -> tuple[manifest.StoredFile, manifest.StoredFile]:
        """Make the delta and the digest table, which are complete, durable; return what the manifest says of them."""
        delta_suffix, table_suffix, _ = self._suffixes
        self.delta.finish()
        self.table.finish()
        return (
            manifest.StoredFile(delta_suffix, self.delta.size, self.delta.checksum()),
            manifest.StoredFile(table_suffix, self.table.size, self.table.checksum()),
        )

    def commit(self, content: Manifest) -> None:
        """Make the generation a part of the chain. It is complete at the moment when its manifest is linked.

        First, the contents of all files are made durable, and their temporary names, which show that a generation is
        not complete. Then delta and digest table get their names, then the manifest, then ``NAME.ver``. So whenever the
        power fails, the next run finds a complete generation, or can see that it is not complete. Everything that takes
        space on the disk is written before the first link, so that a full disk cannot stop a commit in the middle.
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
        self._committed = True  # before the rename: after it, a signal must not undo a generation that NAME.ver names
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
        """Remove the temporary names, and the final names that this object made but did not commit.

        The next run removes what cannot be removed now: the error that led here is the one to report.
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
        # after a signal just after the link, `_linked` lacks it; on some file systems `are_same` cannot find out
        try:
            if suffix in self._linked or self._directory.are_same(self._final(suffix), self._temporary(suffix)):
                self._directory.unlink(self._final(suffix))
        except StorageError:
            pass
