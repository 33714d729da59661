"""A chain: the files ``NAME.N.*`` and ``NAME.ver`` in one directory, what they mean, and how one more is added.

The order of writing is what the safety of a chain rests on: see `NewGeneration.commit` and `docs/architecture.md`.
"""

import errno
import fcntl
import os
import re
import uuid
from dataclasses import dataclass, field
from types import TracebackType

from blockdiff import codec, manifest
from blockdiff.blocks import DIGEST_SIZES
from blockdiff.deltafile import TableReader
from blockdiff.durable import Directory, OutputFile
from blockdiff.errors import BusyError, ChainError, DamagedError, StorageError, UsageError, printable
from blockdiff.manifest import Manifest

DELTA_SUFFIXES = tuple(codec.SUFFIXES.values())
TABLE_SUFFIXES = tuple("." + name for name in DIGEST_SIZES)
MANIFEST_SUFFIX = ".json"

_COMPRESSION = {suffix: name for name, suffix in codec.SUFFIXES.items()}
_VERSION = re.compile(rb"([1-9][0-9]{0,17})\n?")


@dataclass
class Generation:
    """The files of one generation, as far as they are there.

    `manifest` is None where there is none, as in chains of the original, or where it is damaged, which
    `manifest_error` then tells.
    """

    directory: Directory
    base: str
    number: int
    suffixes: set[str] = field(default_factory=set)
    manifest: Manifest | None = None
    manifest_sha256: str | None = None
    manifest_error: DamagedError | None = None

    def name(self, suffix: str) -> str:
        """Return the name of the file with this suffix."""
        return f"{self.base}.{self.number}{suffix}"

    def path(self, suffix: str = "") -> str:
        """Return the path of the file with this suffix, fit for a message."""
        return printable(self.directory.path_of(self.name(suffix)))

    @property
    def delta_suffix(self) -> str:
        """The suffix of the delta; raises `DamagedError` where there is none, or more than one and no manifest."""
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
    def digest(self) -> str:
        """The name of the digest algorithm."""
        return self.table_suffix[1:]

    @property
    def compression(self) -> str:
        """The name of the delta's compression."""
        return _COMPRESSION[self.delta_suffix]

    def _present(self, suffix: str) -> str:
        if suffix not in self.suffixes:
            raise DamagedError(f"{self.path(suffix)} is missing", "restore it from a copy")
        return suffix

    def _only(self, candidates: tuple[str, ...], what: str) -> str:
        found = [suffix for suffix in candidates if suffix in self.suffixes]
        if len(found) != 1:
            how = "is missing" if not found else "is there more than once: " + ", ".join(map(self.path, found))
            raise DamagedError(
                f"the {what} of {self.path()} {how}", "restore it from a copy, or move the wrong one away"
            )
        return found[0]

    def check_files(self) -> None:
        """Raise `DamagedError` unless delta and digest table are there with the sizes that the manifest has."""
        if self.manifest_error is not None:
            raise self.manifest_error
        for suffix in (self.delta_suffix, self.table_suffix):
            size = self.directory.size_of(self.name(suffix))
            stored = self.manifest and (self.manifest.delta if suffix == self.delta_suffix else self.manifest.table)
            if stored and size != stored.size:
                raise DamagedError(f"{self.path(suffix)} has {size} bytes instead of {stored.size}")

    def open_table(self) -> TableReader:
        """Return the digest table; raises `DamagedError` where it cannot be the one that was written.

        A manifest knows its checksum, which covers every byte; without one only its form can be checked.
        """
        suffix = self.table_suffix
        table = TableReader(self.directory.open(self.name(suffix)), self.path(suffix), DIGEST_SIZES[self.digest])
        if self.manifest is not None and table.sha256() != self.manifest.table.sha256:
            table.__exit__()
            raise DamagedError(f"{self.path(suffix)} is damaged: its checksum is not that in the manifest")
        return table

    def stored_bytes(self) -> int:
        """Return the size of the generation's files in bytes."""
        return sum(self.directory.size_of(self.name(suffix)) or 0 for suffix in self.suffixes)


class Chain:
    """The generations that share a NAME, for reading. A context manager.

    `name` is a path without ``.N`` and suffix. Raises `StorageError` where its directory is missing. `generations` are
    by number, committed or not; `version` is what ``NAME.ver`` says, None where it says nothing useful.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        parent, self.base = os.path.split(name)
        if self.base in ("", ".", "..") or "\0" in name:
            raise UsageError(
                f"{printable(name)!r} is no NAME for a chain", "a NAME is a path like /var/backup/web1-disk"
            )
        self.directory = Directory(parent or ".")
        try:
            self.reload()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the directory."""
        self.directory.__exit__(None, None, None)

    def path_of(self, suffix: str) -> str:
        """Return the path of a file of the chain, fit for a message."""
        return printable(self.directory.path_of(self.base + suffix))

    def reload(self) -> None:
        """Read the directory anew."""
        pattern = re.compile(re.escape(self.base) + r"\.([1-9][0-9]{0,17})(\.[a-z0-9]+)?")
        known = {*DELTA_SUFFIXES, *TABLE_SUFFIXES, MANIFEST_SUFFIX}
        self.generations: dict[int, Generation] = {}
        for name in self.directory.names():
            match = pattern.fullmatch(name)
            if match and (suffix := match[2] or "") in known:
                number = int(match[1])
                if number not in self.generations:
                    self.generations[number] = Generation(self.directory, self.base, number)
                self.generations[number].suffixes.add(suffix)
        for generation in self.generations.values():
            self._load_manifest(generation)
        self.has_version_file = self.directory.size_of(f"{self.base}.ver") is not None
        match_version = _VERSION.fullmatch(self.directory.read(f"{self.base}.ver", 64) or b"")
        self.version = int(match_version[1]) if match_version else None

    def _load_manifest(self, generation: Generation) -> None:
        if MANIFEST_SUFFIX not in generation.suffixes:
            return
        content = self.directory.read(generation.name(MANIFEST_SUFFIX), manifest.MAX_BYTES) or b""
        path = generation.path(MANIFEST_SUFFIX)
        try:
            found = manifest.from_bytes(content, path)
            if found.generation != generation.number:
                raise DamagedError(f"{path} is the manifest of generation {found.generation}", "move it away")
            generation.manifest, generation.manifest_sha256 = found, manifest.sha256(content)
        except DamagedError as error:
            generation.manifest_error = error

    def last(self) -> int:
        """Return the number of the last complete generation, 0 for a chain that has none yet.

        Manifests count where ``NAME.ver`` is missing, damaged, or behind them: a manifest is what completes a
        generation. Raises `DamagedError` where nothing tells.
        """
        complete = [n for n, generation in self.generations.items() if self._is_complete(generation)]
        if self.version is not None:
            last = self.version
            while last + 1 in complete:
                last += 1
            return last
        if complete:
            return max(complete)
        if not self.generations and not self.has_version_file:
            return 0
        raise DamagedError(
            f"{self.path_of('.ver')} {'says nothing' if self.has_version_file else 'is missing'}, "
            "and there are no manifests that tell which generation is the last",
            self._version_hint(),
        )

    def _version_hint(self) -> str:
        pairs = [n for n, g in self.generations.items() if g.suffixes & {*DELTA_SUFFIXES} and ".md5" in g.suffixes]
        if not pairs:
            return "move the files of this NAME away, or use another NAME"
        last = max(pairs)
        return f"if generation {last} is complete (verify NAME@{last} tells): echo {last} > {self.path_of('.ver')}"

    def _is_complete(self, generation: Generation) -> bool:
        if generation.manifest is None:
            return False
        try:
            generation.check_files()
            self.check_parent(generation)
        except DamagedError:
            return False
        return True

    def check_parent(self, generation: Generation) -> None:
        """Raise `DamagedError` unless the generation was built on the one before it, as far as manifests tell."""
        known = generation.manifest
        parent = self.generations.get(generation.number - 1)
        if known is None or parent is None or parent.manifest is None:
            return
        expected = manifest.Parent(parent.number, parent.manifest_sha256)
        if known.chain != parent.manifest.chain or known.parent != expected:
            raise DamagedError(
                f"{generation.path(MANIFEST_SUFFIX)} was not built on the generation {parent.number} that is there",
                "were files of another chain copied in? move them away and restore the right ones from a copy",
            )

    def generation(self, number: int | None) -> Generation:
        """Return a generation, the last complete one for None; raises `DamagedError` where it is not there."""
        wanted = self.last() if number is None else number
        if wanted in self.generations:
            return self.generations[wanted]
        if not self.generations:
            raise ChainError(
                f"there is no chain {printable(self.name)}", "is the NAME right? it has no .N and no suffix"
            )
        if number is None or number <= self.last():
            raise DamagedError(
                f"generation {wanted} of {printable(self.name)} is missing", "restore its files from a copy"
            )
        raise ChainError(f"{printable(self.name)} has no generation {wanted}, the last one is {self.last()}")

    def needed(self, number: int) -> list[Generation]:
        """Return the generations that generation `number` may be made of, newest first, down to the last full one.

        It ends early where a generation is missing: whether that one is needed shows only while restoring.
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


class LockedChain(Chain):
    """A chain that this process alone may add to, after what a crash left was put in order.

    Raises `BusyError` where another run holds it. `notes` says what was put in order.
    """

    def __init__(self, name: str) -> None:
        if re.search(r"@[0-9]+$", name):
            raise UsageError(f"a NAME cannot end like {printable(name)!r}", "NAME@2 names generation 2 of a chain NAME")
        self.notes: list[str] = []
        self._lock_fd = -1
        super().__init__(name)
        try:
            self._lock()
            self._remove_temporary()
            self.reload()
            self._recover()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "LockedChain":
        return self

    def close(self) -> None:
        """Release the lock and close the directory."""
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        super().close()

    def _lock(self) -> None:
        self._lock_fd = self.directory.open_lock(f".{self.base}.lock")
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise StorageError(f"cannot lock {self.path_of('.lock')}: {error.strerror}") from error
            raise BusyError(
                f"another run is busy with {printable(self.name)}", "let it finish, then run again"
            ) from error

    def _remove_temporary(self) -> None:
        pattern = re.compile(re.escape(f".{self.base}.") + r"(ver|[1-9][0-9]*(\.[a-z0-9]+)?)\.tmp")
        for name in self.directory.names():
            if pattern.fullmatch(name):
                self.directory.unlink(name)

    def _recover(self) -> None:
        last = self.last()
        if last and last != self.version:
            self.write_version(last)
            self.notes.append(f"{self.path_of('.ver')} was put right: generation {last} is the last complete one")
        beyond = [generation for number, generation in self.generations.items() if number > last]
        for generation in beyond:
            for suffix in sorted(generation.suffixes):
                self._set_aside(generation, suffix)
            del self.generations[generation.number]
        if beyond:
            self.directory.sync()

    def _set_aside(self, generation: Generation, suffix: str) -> None:
        name, taken, count = generation.name(suffix), set(self.directory.names()), 1
        while f"{name}.aside-{count}" in taken:
            count += 1
        self.directory.rename(name, f"{name}.aside-{count}")
        self.notes.append(f"{generation.path(suffix)} was never completed; it was moved to {name}.aside-{count}")

    def write_version(self, number: int) -> None:
        """Let ``NAME.ver`` say that `number` is the last complete generation."""
        temporary = f".{self.base}.ver.tmp"
        self.directory.unlink(temporary)
        try:
            with self.directory.create(temporary) as file:
                file.write(b"%d\n" % number)
                file.finish()
            self.directory.rename(temporary, f"{self.base}.ver")
        except BaseException:
            self.directory.unlink(temporary)
            raise
        self.directory.sync()
        self.version = number

    def chain_id(self) -> str:
        """Return the identifier that the chain's manifests share; a new one where there is no manifest yet."""
        known = [generation.manifest.chain for generation in self.generations.values() if generation.manifest]
        return known[-1] if known else uuid.uuid4().hex

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
            self.delta = self._create(delta_suffix)
            self.table = self._create(table_suffix)
        except BaseException:
            self._undo()
            raise

    def __enter__(self) -> "NewGeneration":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._undo()

    def _create(self, suffix: str) -> OutputFile:
        file = self._directory.create(self._temporary(suffix))
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
            manifest.StoredFile(delta_suffix, self.delta.size, self.delta.sha256()),
            manifest.StoredFile(table_suffix, self.table.size, self.table.sha256()),
        )

    def commit(self, content: Manifest) -> None:
        """Make the generation a part of the chain. The link of the manifest is the moment that decides.

        Every content is durable before any name appears, delta and table have their names before the manifest has, and
        ``NAME.ver`` follows: whenever the power fails, what is found later is complete or not there.
        """
        delta_suffix, table_suffix, manifest_suffix = self._suffixes
        with self._create(manifest_suffix) as file:
            file.write(content.to_bytes())
            file.finish()
        for suffix in (delta_suffix, table_suffix):
            self._link(suffix)
        self._directory.sync()
        self._link(manifest_suffix)
        self._directory.sync()
        self._committed = True
        self._chain.write_version(self.number)

    def _link(self, suffix: str) -> None:
        self._directory.link(self._temporary(suffix), self._final(suffix))
        self._linked.append(self._final(suffix))

    def _undo(self) -> None:
        """Remove the temporary names, and the final ones that this very object made and did not commit."""
        for file in self._files:
            file.__exit__(None, None, None)
        if not self._committed:
            for name in reversed(self._linked):
                self._directory.unlink(name)
        for suffix in self._suffixes:
            self._directory.unlink(self._temporary(suffix))
