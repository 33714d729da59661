"""Repair a chain: rebuild what can be derived, set aside what is broken.

A generation whose blocks are proven by its digest table stays, and gets a manifest if it has none that fits, or its
digest table if only that is lost. After the last of these, what cannot be restored is set aside: renamed, not removed;
the chain then continues there. Before it, what is broken stays, because younger generations may need its delta. If
nothing can be restored, nothing is touched.

First `diagnosis` finds out what can be restored, then a `Plan` says what is to be done: both only read. Then it is
done. A second run finds nothing to do.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from blockdiff.chain.commit import LockedChain
from blockdiff.chain.durable import OutputFile
from blockdiff.chain.generations import Chain
from blockdiff.chain.temporary import UnnamedFile
from blockdiff.check.diagnosis import Advance, Diagnosis, diagnose
from blockdiff.check.remanifest import Manifests

_PIECE = 1 << 20


@dataclass(frozen=True)
class SetAside:
    """Give the file `name` another name."""

    text: str
    name: str


@dataclass(frozen=True)
class Write:
    """Write the file `name` again; an existing one is set aside."""

    text: str
    name: str
    content: bytes | UnnamedFile


@dataclass(frozen=True)
class WriteVersion:
    """Let ``NAME.ver`` say that `number` is the last generation."""

    text: str
    number: int


Deed = SetAside | Write | WriteVersion


@dataclass
class Plan:
    """What there is to do, each with its `text`; `lost` says of each generation that cannot be restored why.

    `advice` says what the operator can do about those.
    """

    deeds: list[Deed] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    advice: str | None = None


@contextmanager
def planned(chain: Chain, advance: Advance = lambda count: None) -> Iterator[Plan]:
    """Yield what there is to do; changes nothing. `advance` gets the bytes that were read.

    Raises `StorageError` if something cannot be read now, which need not be broken.
    """
    with ExitStack() as files:
        last = _last(chain)
        yield _plan(chain, last, diagnose(chain, last, files, advance))


def repair(name: str, advance: Advance = lambda count: None, told: Callable[[str], object] = lambda text: None) -> Plan:
    """Do what there is to do with the chain `name`, and return it; `told` gets each deed when it is done.

    Raises `BusyError` if a run is at work, and `StorageError` if something cannot be read or written.
    """
    with LockedChain(name, recovers=False) as chain:
        for note in chain.notes:
            told(note)
        with planned(chain, advance) as plan:
            for deed in plan.deeds:
                _do(deed, chain)
                told(deed.text)
            return plan


def _last(chain: Chain) -> int:
    """Return the number of the last generation that may be complete: the last with both files, if no ``.ver`` says so.

    Manifests would say so as well, but one that is damaged would hide its generation; the files prove what they hold.
    """
    return chain.last_pair() if chain.version is None else chain.last()


def _plan(chain: Chain, last: int, found: dict[int, Diagnosis]) -> Plan:
    """Return what there is to do with the chain as it was found."""
    lost = {n: each.error for n, each in found.items() if each.error is not None}
    sound = {n: each for n, each in found.items() if each.error is None}
    if not sound:
        return Plan([], lost, _NOTHING_LEFT if lost else None)
    newest = max(sound)
    deeds: list[Deed] = [*_tables(sound), *_beyond(chain, newest, last)]
    manifests = Manifests(chain, sound)
    for each in manifests.changes():
        text = f"{each.path} {each.why}"
        deeds.append(SetAside(text, each.name) if each.content is None else Write(text, each.name, each.content))
    if chain.version != newest:
        deeds.append(WriteVersion(f"{chain.path_of('.ver')} says that {newest} is the last generation", newest))
    return Plan(deeds, *_losses(chain, lost, min(sound), manifests.oldest_is_full()))


def _tables(sound: dict[int, Diagnosis]) -> Iterator[Write]:
    """Yield the digest tables that were made of the deltas."""
    for each in sound.values():
        if each.table is not None and each.generation is not None:
            suffix = each.generation.table_suffix
            text = f"{each.generation.path(suffix)} rebuilt from the deltas"
            yield Write(text, each.generation.name(suffix), each.table)


def _beyond(chain: Chain, newest: int, last: int) -> Iterator[SetAside]:
    """Yield the files after the newest generation that can be restored."""
    for number, generation in chain.generations.items():
        if number > newest:
            why = "was never completed" if number > last else "cannot be restored"
            for suffix in sorted(generation.suffixes):
                text = f"{generation.path(suffix)} set aside: generation {number} {why}"
                yield SetAside(text, generation.name(suffix))


_NOTHING_LEFT = (
    "nothing can be restored, so nothing is touched. Put the missing files back from a copy and run repair again. "
    "Without a copy: `restore --salvage` saves what is left of a generation, and `backup --full` continues this chain"
)


def _losses(chain: Chain, lost: dict[int, str], oldest: int, is_full: bool) -> tuple[dict[int, str], str | None]:
    """Return what is lost, and what to do about it, mostly about what is before `oldest`, the first sound generation.

    A generation that is not needed is not lost: one that does not exist, before one that turns out to be full.
    """
    if is_full and oldest == next(iter(chain.generations)):
        lost = {n: why for n, why in lost.items() if n > oldest}
    if not lost:
        return lost, None
    advice = "put their files back from a copy and run repair again"
    left = [n for n in lost if n < oldest and n in chain.generations]
    if is_full and left:
        which = f"generation {left[0]}" if len(left) == 1 else f"generations {left[0]} to {left[-1]}"
        advice += (
            f". Without a copy: generation {oldest} is full and needs nothing before it; move the files of {which} away"
        )
    return lost, advice


def _do(deed: Deed, chain: LockedChain) -> None:
    if isinstance(deed, WriteVersion):
        chain.write_version(deed.number)
    elif isinstance(deed, SetAside):
        chain.set_aside(deed.name)
        chain.directory.sync()
    elif isinstance(deed.content, bytes):
        content = deed.content
        chain.replace(deed.name, lambda file: file.write(content))
    else:
        chain.replace(deed.name, partial(_copy, deed.content))


def _copy(table: UnnamedFile, file: OutputFile) -> None:
    table.seek(0)
    while piece := table.read(_PIECE):
        file.write(piece)
