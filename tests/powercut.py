"""Simulate power cuts: record what is done to a directory, and enumerate the states that may be found afterwards.

The rules are the weakest that POSIX allows. What was not synced may exist, or not, or in part. The bytes of a file are
durable after fsync(2) of the file, the names in a directory after fsync(2) of the directory; neither implies the other.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

#: For up to this many changes of names that were not synced, every subset of them is tried: 2^8.
_ALL_SUBSETS = 8


class Write(NamedTuple):
    """Bytes are written to a file. If it is shorter than `offset`, it first grows with zeros."""

    file: int
    offset: int
    data: bytes


class Cut(NamedTuple):
    """A file gets this size in bytes."""

    file: int
    size: int


class SyncFile(NamedTuple):
    """Everything written to the file is now durable."""

    file: int


class Enter(NamedTuple):
    """A file gets a name: it was created or linked."""

    name: str
    file: int


class Move(NamedTuple):
    """A file is renamed."""

    name: str
    new_name: str
    file: int


class Remove(NamedTuple):
    """A name is removed."""

    name: str


class SyncNames(NamedTuple):
    """All changes of names are now durable."""


Change = Write | Cut
NameChange = Enter | Move | Remove
Step = Change | NameChange | SyncFile | SyncNames


@dataclass(frozen=True)
class Found:
    """The state of the directory after a power cut: each name, with the number and the content of its file."""

    files: frozenset[tuple[str, int, bytes]]

    def put(self, directory: Path) -> None:
        """Create this state in a new directory; several names of one file are hard links."""
        directory.mkdir()
        first: dict[int, Path] = {}
        for name, file, content in sorted(self.files):
            if file in first:
                os.link(first[file], directory / name)
            else:
                first[file] = directory / name
                first[file].write_bytes(content)


@dataclass(frozen=True)
class History:
    """The steps that changed a directory, and its state before them, which is durable."""

    names: dict[str, int]
    contents: dict[int, bytes]
    steps: list[Step] = field(default_factory=list)

    def syncs(self) -> list[int]:
        """Return the indices of the steps that make something durable."""
        return [at for at, step in enumerate(self.steps) if isinstance(step, SyncFile | SyncNames)]

    def without(self, at: int) -> "History":
        """Return the same history without one step."""
        return History(self.names, self.contents, self.steps[:at] + self.steps[at + 1 :])

    def found(self, done: int) -> set[Found]:
        """Return all states that may be found if the power is cut after `done` steps."""
        names, contents = dict(self.names), dict(self.contents)
        loose_names: list[NameChange] = []
        loose: dict[int, list[Change]] = {}
        for step in self.steps[:done]:
            if isinstance(step, SyncNames):
                names, loose_names = _named(names, loose_names), []
            elif isinstance(step, SyncFile):
                contents[step.file] = _written(contents.get(step.file, b""), loose.pop(step.file, []))
            elif isinstance(step, Write | Cut):
                loose.setdefault(step.file, []).append(step)
            else:
                loose_names.append(step)
        variants = {
            file: sorted(_variants(contents.get(file, b""), loose.get(file, [])))
            for file in {*names.values(), *(step.file for step in loose_names if not isinstance(step, Remove))}
        }
        found = set()
        for subset in _subsets(loose_names):
            there = _named(names, subset)
            files = sorted(set(there.values()))
            for chosen in product(*(variants[file] for file in files)):
                content = dict(zip(files, chosen, strict=True))
                found.add(Found(frozenset((name, file, content[file]) for name, file in there.items())))
        return found

    def complete(self) -> dict[str, bytes]:
        """Return the names and their contents after all steps, if no power is cut."""
        contents = dict(self.contents)
        for step in self.steps:
            if isinstance(step, Write | Cut):
                contents[step.file] = _written(contents.get(step.file, b""), [step])
        names = _named(self.names, [step for step in self.steps if isinstance(step, NameChange)])
        return {name: contents.get(file, b"") for name, file in names.items()}


def _named(names: dict[str, int], changes: list[NameChange]) -> dict[str, int]:
    result = dict(names)
    for change in changes:
        if isinstance(change, Remove | Move):
            result.pop(change.name, None)
        if isinstance(change, Enter):
            result[change.name] = change.file
        elif isinstance(change, Move):
            result[change.new_name] = change.file
    return result


def _subsets(changes: list[NameChange]) -> Iterator[list[NameChange]]:
    if len(changes) <= _ALL_SUBSETS:
        for count in range(len(changes) + 1):
            yield from map(list, combinations(changes, count))
        return
    for at in range(len(changes) + 1):  # each prefix, all without one, and each alone
        yield changes[:at]
        yield changes[:at] + changes[at + 1 :]
        yield changes[at : at + 1]


def _written(content: bytes, changes: list[Change]) -> bytes:
    result = bytearray(content)
    for change in changes:
        end = change.offset + len(change.data) if isinstance(change, Write) else change.size
        result.extend(bytes(max(0, end - len(result))))
        if isinstance(change, Write):
            result[change.offset : end] = change.data
        else:
            del result[end:]
    return bytes(result)


def _variants(content: bytes, changes: list[Change]) -> set[bytes]:
    """Return the possible contents of a file: each change may be complete, missing, half done, or zeros instead."""
    found = {content, _written(content, changes)}
    for at, change in enumerate(changes):
        others = changes[:at], changes[at + 1 :]
        found.add(_written(content, others[0]))
        found.add(_written(content, [*others[0], *others[1]]))
        if isinstance(change, Write):
            torn = change._replace(data=change.data[: len(change.data) // 2])
            zeros = change._replace(data=bytes(len(change.data)))
            found |= {_written(content, [*others[0], each]) for each in (torn, zeros)}
            found.add(_written(content, [*others[0], zeros, *others[1]]))
    return found


class Recorder:
    """Replaces the module `os`, and records the changes to one directory. It ignores locks."""

    def __init__(self, directory: Path) -> None:
        self._directory = os.stat(directory)
        inodes: dict[int, int] = {}
        names: dict[str, int] = {}
        contents: dict[int, bytes] = {}
        for path in sorted(directory.iterdir()):
            if path.suffix != ".lock":
                file = inodes.setdefault(path.stat().st_ino, len(inodes))
                names[path.name], contents[file] = file, path.read_bytes()
        self.history = History(names, contents)
        self._names = dict(names)
        self._files = len(inodes)
        self._open: dict[int, int | None] = {}  # None: the directory itself

    def __getattr__(self, name: str) -> object:
        return getattr(os, name)

    def open(self, path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        name = os.path.basename(path)
        if flags & os.O_DIRECTORY and os.path.samestat(os.fstat(fd), self._directory):
            self._open[fd] = None
        elif flags & os.O_CREAT and not name.endswith(".lock"):
            if name not in self._names:
                self._files += 1
                self._names[name] = self._files
                self.history.steps.append(Enter(name, self._files))
            self._open[fd] = self._names[name]
        return fd

    def close(self, fd: int) -> None:
        self._open.pop(fd, None)
        os.close(fd)

    def write(self, fd: int, data: memoryview) -> int:
        count = os.write(fd, data)
        self._note_write(fd, os.lseek(fd, 0, os.SEEK_CUR) - count, data[:count])
        return count

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        count = os.pwrite(fd, data, offset)
        self._note_write(fd, offset, data[:count])
        return count

    def _note_write(self, fd: int, offset: int, data: memoryview) -> None:
        file = self._open.get(fd)
        if file is not None:
            self.history.steps.append(Write(file, offset, bytes(data)))

    def ftruncate(self, fd: int, size: int) -> None:
        os.ftruncate(fd, size)
        file = self._open.get(fd)
        if file is not None:
            self.history.steps.append(Cut(file, size))

    def fsync(self, fd: int) -> None:
        os.fsync(fd)
        if fd in self._open:
            file = self._open[fd]
            self.history.steps.append(SyncNames() if file is None else SyncFile(file))

    def link(
        self,
        source: str,
        target: str,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
        follow_symlinks: bool = True,
    ) -> None:
        os.link(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd, follow_symlinks=follow_symlinks)
        if source.endswith(".lock"):
            return
        file = self._names[os.path.basename(source)]
        self._names[os.path.basename(target)] = file
        self.history.steps.append(Enter(os.path.basename(target), file))

    def rename(self, source: str, target: str, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None) -> None:
        os.rename(source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        file = self._names.pop(os.path.basename(source))
        self._names[os.path.basename(target)] = file
        self.history.steps.append(Move(os.path.basename(source), os.path.basename(target), file))

    def unlink(self, path: str, *, dir_fd: int | None = None) -> None:
        os.unlink(path, dir_fd=dir_fd)
        if self._names.pop(os.path.basename(path), None) is not None:
            self.history.steps.append(Remove(os.path.basename(path)))


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch, directory: Path, *modules: ModuleType) -> Iterator[History]:
    """Record what `modules` do to a directory through their name ``os``. Fails if something else changes it."""
    recorder = Recorder(directory)
    with monkeypatch.context() as patch:
        for module in modules:
            patch.setattr(module, "os", recorder)
        yield recorder.history
    there = {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}
    assert recorder.history.complete() == there, "something changed the directory past the recorder"


def each_state(history: History, told: int, check: Callable[[Found, bool], None]) -> int:
    """Call `check` with every state that may be found, and whether success was already reported; return their number.

    `told` is the number of steps after which success was reported. The latest states come first, because most errors
    are found there.
    """
    seen: set[tuple[Found, bool]] = set()
    for done in range(len(history.steps), -1, -1):
        complete = done >= told
        for found in history.found(done):
            if (found, complete) not in seen:
                seen.add((found, complete))
                check(found, complete)
    return len(seen)
