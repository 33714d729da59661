"""Which files of which chains are in a directory. The directory is listed once, however many chains there are."""

import re
from collections.abc import Collection

from blockdiff.chain.durable import Directory
from blockdiff.format import codec
from blockdiff.shared.blocks import DIGEST_SIZES
from blockdiff.shared.errors import DamagedError, StorageError

DELTA_SUFFIXES = tuple(codec.SUFFIXES.values())
TABLE_SUFFIXES = tuple("." + name for name in DIGEST_SIZES)
MANIFEST_SUFFIX = ".json"

_VERSION_SUFFIX = ".ver"
_SUFFIXES = frozenset((*DELTA_SUFFIXES, *TABLE_SUFFIXES, MANIFEST_SUFFIX))
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_VERSION = re.compile(rb"([1-9][0-9]{0,17})\n?")

#: What ``backup --chain`` appends to a NAME.
_PERIOD = re.compile(r"-(19|20|21)[0-9]{2}((0[1-9]|1[0-2])(0[1-9]|[12][0-9]|3[01])?|W[0-5][0-9])")


class Inventory:
    """The files of the chains in a directory, at the time when it was listed.

    Here, a NAME is without its directory. ``NAME.ver`` is read for the NAMEs `bases`, or for all if that is None.
    Raises `StorageError` if the directory cannot be read.
    """

    def __init__(self, directory: Directory, bases: Collection[str] | None = None) -> None:
        if bases is None:
            bases = _with_version(directory)
        # before the directory is listed: if a run ends in between, its manifest shows its generation
        self._versions = {base: _version(directory, base) for base in bases if directory.has(base + _VERSION_SUFFIX)}
        self._found: dict[str, dict[int, set[str]]] = {}
        self._locks: list[str] = []
        for name in directory.names():
            if name.startswith(".") and name.endswith(".lock"):
                self._locks.append(name[1 : -len(".lock")])
                continue
            base, number, suffix = _parts(name)
            if base:
                self._found.setdefault(base, {}).setdefault(number, set()).add(suffix)

    @classmethod
    def of_periods(cls, directory: Directory, base: str) -> "Inventory":
        """Return an inventory for `periods(base)`, which reads no ``.ver`` of other chains. Raises `StorageError`."""
        return cls(directory, [each for each in _with_version(directory) if _is_period(each, base)])

    def has_version(self, base: str) -> bool:
        """Return whether there is a ``NAME.ver``."""
        return base in self._versions

    def version(self, base: str) -> int | None:
        """Return the number in ``NAME.ver``, None if there is no valid one; raises `StorageError`."""
        found = self._versions.get(base)
        if isinstance(found, StorageError):
            raise found
        return found

    def generations(self, base: str) -> dict[int, set[str]]:
        """Return the suffixes of the existing files, by the number of their generation, in ascending order."""
        return dict(sorted(self._found.get(base, {}).items()))

    def has(self, base: str) -> bool:
        """Return whether a chain has a ``NAME.ver``, or a file of a generation."""
        return base in self._versions or base in self._found

    def bases(self) -> list[str]:
        """Return the NAMEs of all chains, sorted.

        A name that only has deltas is not a chain: ``backup.log.1.gz`` is usually a log, not the rest of a chain.
        """
        return [base for base in self._names() if base in self._versions or self._has_more_than_deltas(base)]

    def _names(self) -> list[str]:
        return sorted({*self._versions, *self._found})

    def _has_more_than_deltas(self, base: str) -> bool:
        return any(suffixes.difference(DELTA_SUFFIXES) for suffixes in self._found[base].values())

    def without_generations(self) -> list[str]:
        """Return the NAMEs of chains that a run has begun (they have a lock), but that have no generation yet."""
        return [base for base in self._locks if not self.has(base)]

    def periods(self, base: str) -> list[str]:
        """Return the existing chains ``NAME-DATE`` that ``backup --chain`` may have begun for the NAME `base`."""
        return [each for each in self._names() if _is_period(each, base)]

    def begun(self, base: str) -> list[str]:
        """Return which of `base` and its ``NAME-DATE`` are `without_generations`."""
        return [each for each in self.without_generations() if each == base or _is_period(each, base)]


def _is_period(name: str, base: str) -> bool:
    return name.startswith(base) and _PERIOD.fullmatch(name, len(base)) is not None


def _with_version(directory: Directory) -> list[str]:
    """Return the NAMEs that have a ``NAME.ver``."""
    files = [name for name in directory.names() if name.endswith(_VERSION_SUFFIX) and not name.startswith(".")]
    return [name.removesuffix(_VERSION_SUFFIX) for name in files]


def _version(directory: Directory, base: str) -> int | StorageError | None:
    try:
        match = _VERSION.fullmatch(directory.read(base + _VERSION_SUFFIX, 64) or b"")
    except DamagedError:  # it is not a file
        return None
    except StorageError as error:  # raised only when this chain is asked for: it must not hide the others
        return error
    return int(match[1]) if match else None


def _parts(name: str) -> tuple[str, int, str]:
    """Return NAME, number and suffix of a file of a chain; NAME is empty for any other file."""
    stem, dot, last = name.rpartition(".")
    suffix = dot + last
    if suffix not in _SUFFIXES:
        stem, suffix = name, ""
    base, _dot, number = stem.rpartition(".")
    return (base, int(number), suffix) if _NUMBER.fullmatch(number) else ("", 0, "")
