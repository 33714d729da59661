"""A chain as it is on the disk: the files ``NAME.N.*`` and ``NAME.ver`` in one directory, and what they mean.

Nothing here writes to the directory; `commit` does.
"""

import copy
import os
import shlex
from collections.abc import Iterator
from functools import cached_property
from types import TracebackType

from blockdiff.chain.durable import Directory
from blockdiff.chain.inventory import DELTA_SUFFIXES, MANIFEST_SUFFIX, TABLE_SUFFIXES, Inventory
from blockdiff.chain.temporary import UnnamedFile
from blockdiff.format import checksum, codec, manifest
from blockdiff.format.digesttable import TableReader
from blockdiff.format.manifest import Manifest
from blockdiff.shared.blocks import DIGEST_SIZES
from blockdiff.shared.errors import (
    BlockdiffError,
    BusyError,
    ChainError,
    DamagedError,
    StorageError,
    UsageError,
    printable,
)

#: A message names at most this many chains of `backup --chain` to choose from: one for each month of a year.
_SHOWN_PERIODS = 12
_COMPRESSION = {suffix: name for name, suffix in codec.SUFFIXES.items()}
_TABLE_HINT = "`blockdiff repair` rebuilds it, if the deltas are sound"


class Generation:
    """The existing files of one generation. Its manifest is read once, when it is first needed.

    `table`, if it is given, is read instead of the digest table in the directory.
    """

    def __init__(
        self, directory: Directory, base: str, number: int, suffixes: set[str], table: UnnamedFile | None = None
    ) -> None:
        self.directory = directory
        self.base = base
        self.number = number
        self.suffixes = suffixes
        self._table = table

    def with_table(self, table: UnnamedFile) -> "Generation":
        """Return it as it will be when its lost digest table exists again, with the content of `table`."""
        assert self.manifest is not None, "only a manifest knows which table was lost"
        suffixes = self.suffixes | {self.manifest.table.suffix}
        return Generation(self.directory, self.base, self.number, suffixes, table)

    def bare(self) -> "Generation":
        """Return it without its manifest. If it has two deltas, or two digest tables, the manifest's one is kept."""
        suffixes = self.suffixes - {MANIFEST_SUFFIX}
        if self.manifest is not None:
            suffixes -= {*DELTA_SUFFIXES, *TABLE_SUFFIXES} - {self.manifest.delta.suffix, self.manifest.table.suffix}
        return Generation(self.directory, self.base, self.number, suffixes, self._table)

    @cached_property
    def _read(self) -> tuple[Manifest | None, str | None, DamagedError | None]:
        """The manifest, its SHA-256, and what is wrong with it."""
        if MANIFEST_SUFFIX not in self.suffixes:
            return None, None, None
        path = self.path(MANIFEST_SUFFIX)
        try:
            content = self.directory.read(self.name(MANIFEST_SUFFIX), manifest.MAX_BYTES) or b""
            found = manifest.from_bytes(content, path)
            if found.generation != self.number:
                raise DamagedError(f"{path} is the manifest of generation {found.generation}", "move it away")
        except DamagedError as error:
            return None, None, error
        except StorageError as error:  # one file that cannot be read must not hide the other generations
            damaged = DamagedError(error.message, error.hint)
            damaged.__cause__ = error
            return None, None, damaged
        return found, manifest.sha256(content), None

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None if there is none, as in chains of the original, or if it is damaged."""
        return self._read[0]

    @property
    def manifest_sha256(self) -> str | None:
        """The SHA-256 of the manifest, which the next generation's manifest contains."""
        return self._read[1]

    @property
    def manifest_error(self) -> DamagedError | None:
        """What is wrong with the manifest, if it is damaged."""
        return self._read[2]

    def name(self, suffix: str) -> str:
        """Return the name of the file with this suffix."""
        return f"{self.base}.{self.number}{suffix}"

    def path(self, suffix: str = "") -> str:
        """Return the path of the file with this suffix, made printable for a message."""
        return printable(self.directory.path_of(self.name(suffix)))

    @property
    def delta_suffix(self) -> str:
        """The suffix of the delta; raises `DamagedError` if there is none, or more than one and no manifest."""
        if self.manifest is not None:
            return self._present(self.manifest.delta.suffix)
        return self._only(DELTA_SUFFIXES, "delta")

    @property
    def table_suffix(self) -> str:
        """The suffix of the digest table; raises `DamagedError` like `delta_suffix`."""
        if self.manifest is not None:
            return self._present(self.manifest.table.suffix)
        return self._only(TABLE_SUFFIXES, "digest table")

    @property
    def chain_id(self) -> str | None:
        """The identifier that all manifests of a chain contain; None if there is no manifest."""
        return None if self.manifest is None else self.manifest.chain

    @property
    def digest(self) -> str:
        """The name of the digest algorithm."""
        return self.table_suffix[1:]

    @property
    def compression(self) -> str:
        """The name of the delta's compression."""
        return _COMPRESSION[self.delta_suffix]

    def _present(self, suffix: str) -> str:
        if suffix not in self.suffixes:
            hint = _TABLE_HINT if suffix in TABLE_SUFFIXES else "restore it from a copy"
            raise DamagedError(f"{self.path(suffix)} is missing", hint)
        return suffix

    def _only(self, candidates: tuple[str, ...], what: str) -> str:
        found = [suffix for suffix in candidates if suffix in self.suffixes]
        if len(found) != 1:
            how = "is missing" if not found else "exists more than once: " + ", ".join(map(self.path, found))
            raise DamagedError(
                f"the {what} of {self.path()} {how}", "restore it from a copy, or move the wrong one away"
            )
        return found[0]

    def check_files(self) -> None:
        """Raise `DamagedError` if the manifest is damaged, or delta or table is missing or not of the size in it.

        Raises `StorageError` if a file cannot be reached.
        """
        if self.manifest_error is not None:
            raise self.manifest_error
        for suffix in (self.delta_suffix, self.table_suffix):
            size = self.stored_size(suffix)
            stored = self.manifest and (self.manifest.delta if suffix == self.delta_suffix else self.manifest.table)
            if stored and size != stored.size:
                raise DamagedError(f"{self.path(suffix)} has {size} bytes instead of {stored.size}")

    def open_table(self) -> TableReader:
        """Return the digest table; raises `DamagedError` if it is not the one that was written.

        The manifest has its checksum, which covers every byte. Without a manifest, only its form can be checked.
        """
        suffix = self.table_suffix
        fd = self.directory.open(self.name(suffix)) if self._table is None else os.dup(self._table.fileno())
        table = TableReader(fd, self.path(suffix), DIGEST_SIZES[self.digest])
        if self.manifest is not None and checksum.of_sha256(table.sha256()) != self.manifest.table.checksum:
            table.close()
            raise DamagedError(f"{self.path(suffix)} is damaged: its checksum is not that in the manifest", _TABLE_HINT)
        return table

    def stored_size(self, suffix: str) -> int | None:
        """Return the size of the file with this suffix in bytes, None if there is none; raises like `open`."""
        if self._table is not None and suffix in TABLE_SUFFIXES:
            return os.fstat(self._table.fileno()).st_size
        return self.directory.size_of(self.name(suffix))

    def size_of(self, suffix: str) -> int:
        """Return the size of the file with this suffix in bytes, 0 if it is not a file or cannot be reached."""
        try:
            return self.stored_size(suffix) or 0
        except (DamagedError, StorageError):
            return 0

    def stored_bytes(self) -> int:
        """Return the size of the generation's files in bytes."""
        return sum(map(self.size_of, self.suffixes))


class Chain:
    """The generations that share a NAME, for reading. A context manager.

    `name` is a path without ``.N`` and suffix; `inventory` is that of its directory, if the caller has one. Raises
    `StorageError` if the directory is missing. `generations` has all generations by number, committed or not; `version`
    is the number in ``NAME.ver``, None if there is no valid one.
    """

    #: Whether the chain is written to: see `Directory`.
    is_written = False

    def __init__(self, name: str, inventory: Inventory | None = None) -> None:
        self.name = name
        parent, self.base = os.path.split(name)
        if self.base in ("", ".", "..") or "\0" in name:
            raise UsageError(
                f"{printable(name)!r} is not a NAME for a chain", "a NAME is a path like /var/backup/web1-disk"
            )
        self.directory = Directory(parent or ".", self.is_written)
        try:
            self._begin()
            self._read_inventory(inventory or Inventory(self.directory, [self.base]))
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Do what must be done before the directory is listed: nothing for a chain that is only read."""

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory."""
        self.directory.close()

    def path_of(self, suffix: str) -> str:
        """Return the path of a file of the chain, made printable for a message."""
        return printable(self.directory.path_of(self.base + suffix))

    def reload(self) -> None:
        """List the directory again."""
        self._read_inventory(Inventory(self.directory, [self.base]))

    def _read_inventory(self, inventory: Inventory) -> None:
        self.has_version_file = inventory.has_version(self.base)
        self.version = inventory.version(self.base)
        self._periods = inventory.periods(self.base)
        self._begun = inventory.begun(self.base)
        self.generations = {
            number: Generation(self.directory, self.base, number, suffixes)
            for number, suffixes in inventory.generations(self.base).items()
        }

    def seen_with(self, generations: dict[int, Generation]) -> "Chain":
        """Return a copy of the chain that has these generations. It shares the open directory with this one."""
        seen = copy.copy(self)
        seen.generations = generations
        return seen

    def last(self) -> int:
        """Return the number of the last complete generation, 0 for a chain that has none yet.

        A generation with its manifest is complete, even if ``NAME.ver`` is missing, damaged or older. Manifests of
        another chain do not count. Raises `DamagedError` if neither ``NAME.ver`` nor a manifest shows the last one.
        """
        complete = {
            n: generation.manifest.chain
            for n, generation in self.generations.items()
            if generation.manifest is not None and self._is_complete(generation)
        }
        if self.version is not None:
            last = self.version
            while last + 1 in complete:
                last += 1
            ours = {g.manifest.chain for n, g in self.generations.items() if n <= last and g.manifest is not None}
            return max([last, *(n for n, chain in complete.items() if chain in ours)])
        if complete:
            return max(n for n, chain in complete.items() if chain == complete[min(complete)])
        if not self.generations and not self.has_version_file:
            return 0
        raise DamagedError(
            f"{self.path_of('.ver')} {'says nothing' if self.has_version_file else 'is missing'}, "
            "and no manifest names the last generation",
            self._version_hint(),
        )

    def last_pair(self) -> int:
        """Return the number of the last generation that has a delta and a digest table, 0 if there is none."""
        deltas, tables = {*DELTA_SUFFIXES}, {*TABLE_SUFFIXES}
        return max((n for n, g in self.generations.items() if g.suffixes & deltas and g.suffixes & tables), default=0)

    def _version_hint(self) -> str:
        last = self.last_pair()
        if not last:
            return "move the files of this NAME away, or use another NAME"
        path = shlex.quote(self.path_of(".ver"))
        return f"if generation {last} is complete (verify NAME@{last} says so): echo {last} > {path}"

    def spans(self, last: int) -> Iterator[tuple[int, int]]:
        """Yield (n, n) for each existing generation, up to `last`, and (first, last) for each gap.

        The missing generations before the oldest one are a gap, too, unless that one needs no older one. Before a stray
        file with a huge number there is one gap, not a million missing generations.
        """
        oldest = next(iter(self.generations.values()), None)
        expected = 1 if oldest is None or self.needs_older(oldest) else oldest.number
        for number in self.generations:
            if number > last:
                break
            if expected < number:
                yield expected, number - 1
            yield number, number
            expected = number + 1
        if expected <= last:
            yield expected, last

    @staticmethod
    def needs_older(generation: Generation) -> bool:
        """Return whether a generation needs the one before it, as far as is known.

        Without a manifest, only generation 1 certainly needs none. With a damaged manifest it is not known: False.
        """
        if generation.number == 1 or generation.manifest_error is not None:
            return False
        return generation.manifest is None or not generation.manifest.full

    def _is_complete(self, generation: Generation) -> bool:
        try:
            generation.check_files()
            self.check_parent(generation)
        except (DamagedError, StorageError):
            return False
        return True

    def check_parent(self, generation: Generation) -> None:
        """Raise `DamagedError` unless the generation was built on the one before it, as far as manifests say."""
        known = generation.manifest
        parent = self.generations.get(generation.number - 1)
        if known is None or parent is None or parent.manifest is None:
            return
        # None if the parent's manifest was damaged when this generation was made
        expected = (manifest.Parent(parent.number, parent.manifest_sha256), manifest.Parent(parent.number, None))
        if known.chain != parent.manifest.chain or known.parent not in expected:
            raise DamagedError(
                f"{generation.path(MANIFEST_SUFFIX)} was not built on the existing generation {parent.number}",
                "were files of another chain copied in? move them away and restore the right ones from a copy",
            )

    def check_manifest(self, generation: Generation) -> None:
        """Raise `DamagedError` if there is no manifest although the next generation was built on one."""
        child = self.generations.get(generation.number + 1)
        parent = child.manifest.parent if child is not None and child.manifest is not None else None
        if MANIFEST_SUFFIX not in generation.suffixes and parent is not None and parent.manifest_sha256 is not None:
            raise DamagedError(f"{generation.path(MANIFEST_SUFFIX)} is missing", "restore it from a copy")

    def generation(self, number: int | None) -> Generation:
        """Return a generation, the last complete one for None.

        Raises `DamagedError` if it is missing or cannot be known, `ChainError` if the chain never had it or does not
        exist, and `BusyError` if the first run of the chain is still running.
        """
        wanted = self.last() if number is None else number
        if wanted in self.generations:
            return self.generations[wanted]
        if not self.generations and not self.has_version_file:
            raise self._nothing_here()
        if number is None or number <= self.last():
            raise DamagedError(
                f"generation {wanted} of {printable(self.name)} is missing",
                f"restore its files from a copy; blockdiff list {shlex.quote(printable(self.name))} shows which exist",
            )
        raise ChainError(f"{printable(self.name)} has no generation {wanted}, the last one is {self.last()}")

    def is_busy(self) -> bool:
        """Return whether a run holds the lock of the chain, according to the system."""
        return self.directory.is_locked(f".{self.base}.lock")

    def _nothing_here(self) -> BlockdiffError:
        """Return the error for a chain without generations, with the reason."""
        name = printable(self.name)
        if self._periods:
            shown = [printable(os.path.join(self.directory.path, each)) for each in self._periods[-_SHOWN_PERIODS:]]
            more = "" if len(shown) == len(self._periods) else f" (and {len(self._periods) - len(shown)} older ones)"
            return ChainError(
                f"there is no chain {name}, only those that `backup --chain` began: {', '.join(shown)}{more}",
                "name one of them",
            )
        for each in self._begun:
            if self.directory.is_locked(f".{each}.lock"):
                path = printable(self.directory.path_of(each))
                return BusyError(
                    f"the first run of {path} is still running: no generation is complete yet",
                    "wait until it has finished",
                )
        if os.path.isdir(self.name):
            return ChainError(f"{name} is a directory", f"`blockdiff list {name}` shows the chains in it")
        if self._begun:
            return ChainError(
                f"no generation of {name} is complete: its first run failed or was cut off", "run the backup again"
            )
        return ChainError(
            f"there is no chain {name}", "is the NAME right? it has no .N and no suffix. Is the disk mounted?"
        )

    def needed(self, number: int) -> list[Generation]:
        """Return the generations that a restore of `number` may need, newest first, back to the last full one.

        The list ends before a missing generation: only the restore finds out whether that one is needed.
        """
        found = []
        for n in range(number, 0, -1):
            if n not in self.generations:
                break
            found.append(self.generations[n])
            known = self.generations[n].manifest
            if known is not None and known.full:
                break
        return found


def missing(first: int, last: int) -> DamagedError:
    """Return the error for generation `first` if it and all others up to `last` are missing."""
    what = "none of its files is" if first == last else f"none of the files of generations {first} to {last} is"
    return DamagedError(f"{what} there", "restore them from a copy")
