"""Put a chain in order: rebuild what can be derived, set aside what is broken.

A generation whose blocks are proven by its digest table stays, and gets a manifest if it has none that fits, or its
digest table if only that is lost (`rebuild`). After the last of these, what cannot be restored is set aside:
renamed, not removed; the chain then continues there. Before it, what is broken stays, because younger generations may
need its delta. If nothing can be restored, nothing is touched.

What is to be done is found first, by reading only, so that a dry run says the same, but for what only a digest table
that is rebuilt can prove. Run again, nothing is left to do.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from blockdiff import __version__, merge
from blockdiff.chain import clock
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import DELTA_SUFFIXES, MANIFEST_SUFFIX, TABLE_SUFFIXES
from blockdiff.check import rebuild
from blockdiff.check.verify import CheckedFile, Verifier
from blockdiff.format import checksum, manifest
from blockdiff.format.manifest import Manifest, Parent, Source, StoredFile
from blockdiff.shared.blocks import block_count
from blockdiff.shared.errors import StorageError

Advance = Callable[[int], object]

#: What a rebuilt manifest says of a source that is not known; like that of a command, any can follow.
_UNKNOWN_SOURCE = Source(None, "unknown", "command")
#: What it says of the moment.
_UNKNOWN_CONSISTENCY = "unknown"


@dataclass(frozen=True)
class Deed:
    """Something to do, in words, and how."""

    text: str
    do: Callable[[LockedChain], None]


@dataclass
class Findings:
    """What there is to do; `lost` are the generations that cannot be restored or are missing, each with the reason.

    `advice` says what the operator can do about those. If `rebuilds_tables` more may be found when that is done: a
    table proves other generations as well.
    """

    deeds: list[Deed] = field(default_factory=list)
    lost: dict[int, str] = field(default_factory=dict)
    advice: str | None = None
    rebuilds_tables: bool = False


def examine(chain: Chain, advance: Advance = lambda count: None) -> Findings:
    """Return what there is to do; changes nothing. `advance` gets the bytes that were read."""
    findings = Findings()
    last = _last(chain)
    sound = _sound(chain, last, findings, advance)
    if not sound:
        if findings.lost:
            findings.advice = (
                "nothing can be restored, so nothing is touched. Put the missing files back from a copy and run repair "
                "again. Without a copy: `restore --salvage` saves what is left of a generation, and `backup --full` "
                "continues this chain"
            )
        return findings
    newest = max(sound)
    for number, generation in chain.generations.items():
        if number > newest:
            _set_aside(findings, generation, "was never completed" if number > last else "cannot be restored")
    is_full = _Manifests(chain, sound, findings).relink()
    _advise(chain, min(sound), is_full, findings)
    if chain.version != newest:
        text = f"{chain.path_of('.ver')} says that {newest} is the last generation"
        findings.deeds.append(Deed(text, lambda locked: locked.write_version(newest)))
    return findings


def repair(
    name: str, advance: Advance = lambda count: None, told: Callable[[str], object] = lambda text: None
) -> Findings:
    """Do what there is to do with the chain `name`, and return it; `told` gets each deed when it is done.

    Raises `BusyError` if a run is at work, and `StorageError` if something cannot be written.
    """
    with LockedChain(name, recovers=False) as chain:
        for note in chain.notes:
            told(note)
        done: list[Deed] = []
        while True:
            findings = examine(chain, advance)
            for deed in findings.deeds:
                deed.do(chain)
                told(deed.text)
            done += findings.deeds
            if not findings.rebuilds_tables:
                return Findings(done, findings.lost, findings.advice)
            chain.reload()


def _advise(chain: Chain, oldest: int, is_full: bool, findings: Findings) -> None:
    """Say what to do about what is lost, mostly about what is before `oldest`, the first generation that is sound.

    What never was needed is not lost: the generations before one that turns out to be full, and that are not there.
    """
    if is_full and oldest == next(iter(chain.generations)):
        findings.lost = {n: why for n, why in findings.lost.items() if n > oldest}
    if not findings.lost:
        return
    findings.advice = "put their files back from a copy and run repair again"
    left = [n for n in findings.lost if n < oldest and n in chain.generations]
    if is_full and left:
        which = f"generation {left[0]}" if len(left) == 1 else f"generations {left[0]} to {left[-1]}"
        findings.advice += (
            f". Without a copy: generation {oldest} is full and needs nothing before it; move the files of {which} away"
        )


def _last(chain: Chain) -> int:
    """Return the number of the last generation that may be complete: the last with both files, if no ``.ver`` says so.

    Manifests would say so as well, but one that is damaged would hide its generation; the files prove what they hold.
    """
    return chain.last_pair() if chain.version is None else chain.last()


def _sound(chain: Chain, last: int, findings: Findings, advance: Advance) -> dict[int, bool]:
    """Return the generations that can be restored: True for those whose manifest is as it should be as well."""
    found, without_table = _proven(chain, last, advance, with_manifests=True)
    for n in without_table:
        _rebuild_table(findings, chain.generations[n])
        found[n] = None
    sound = {n: chain.generations[n].manifest is not None for n, error in found.items() if error is None}
    if len(sound) < len(found):
        with Chain(chain.name) as bare:
            for generation in bare.generations.values():
                if generation.number not in without_table:
                    _strip(generation)
            without, _ = _proven(bare, last, advance, with_manifests=False)
        ours = {chain.generations[n].chain_id for n, has_manifest in sound.items() if has_manifest}
        for n, error in without.items():
            # a generation of another chain may be sound in itself, and is not ours
            if error is None and (not ours or chain.generations[n].chain_id in {None, *ours}):
                sound.setdefault(n, False)
    findings.lost = {n: error for n, error in found.items() if error is not None and n not in sound}
    return sound


def _proven(chain: Chain, last: int, advance: Advance, with_manifests: bool) -> tuple[dict[int, str | None], list[int]]:
    """Return what is wrong with each generation, and those of which the digest table follows from the deltas.

    Raises `StorageError` if that cannot be known.
    """
    found: dict[int, str | None] = {}
    without_table: list[int] = []
    if not last:
        return found, without_table
    with Verifier(chain, advance, with_manifests) as verifier:
        for verdict in verifier.all(last):
            for error in (verdict.error, verdict.error and verdict.error.__cause__):
                if isinstance(error, StorageError):  # what cannot be read now need not be broken
                    raise error
            found[verdict.number] = None if verdict.error is None else verdict.error.message
            generation = chain.generations.get(verdict.number)
            if verdict.error is not None and generation is not None and rebuild.can_rebuild(verifier, generation):
                without_table.append(verdict.number)
    return found, without_table


def _strip(generation: Generation) -> None:
    """Let a generation in memory have no manifest; if that said which of two files is the right one, keep to it."""
    if generation.manifest is not None:
        ours = {generation.manifest.delta.suffix, generation.manifest.table.suffix}
        generation.suffixes -= {*DELTA_SUFFIXES, *TABLE_SUFFIXES} - ours
    generation.forget_manifest()


def _set_aside(findings: Findings, generation: Generation, why: str) -> None:
    for suffix in sorted(generation.suffixes):
        text = f"{generation.path(suffix)} set aside: generation {generation.number} {why}"
        findings.deeds.append(Deed(text, partial(_aside, generation.name(suffix))))


def _rebuild_table(findings: Findings, generation: Generation) -> None:
    assert generation.manifest is not None
    text = f"{generation.path(generation.manifest.table.suffix)} rebuilt from the deltas"
    findings.deeds.append(Deed(text, partial(rebuild.rebuild, generation.number)))
    findings.rebuilds_tables = True


def _aside(name: str, chain: LockedChain) -> None:
    chain.set_aside(name)
    chain.directory.sync()


class _Manifests:
    """The manifests of the sound generations: each must fit its files and the manifest before it."""

    def __init__(self, chain: Chain, sound: dict[int, bool], findings: Findings) -> None:
        self._chain = chain
        self._sound = sound
        self._findings = findings
        told = [generation.manifest for generation in chain.generations.values() if generation.manifest is not None]
        known = [each for each in told if each.generation in sound] or told  # sound ones know better
        self._id = known[-1].chain if known else uuid.uuid4().hex
        self._source = known[-1].source if known else _UNKNOWN_SOURCE
        self._sha256: dict[int, str | None] = {}
        self._made: dict[int, Manifest] = {}

    def relink(self) -> bool:
        """Go through them from the oldest on; a new one changes what the next must say of its parent.

        Return whether the oldest is full.
        """
        for number, is_fine in sorted(self._sound.items()):
            generation = self._chain.generations[number]
            known = generation.manifest
            if is_fine and known is not None and self._fits(known):
                self._sha256[number], self._made[number] = generation.manifest_sha256, known
                continue
            parent = self._parent(number)
            if is_fine and known is not None:
                made, why = replace(known, chain=self._id, parent=parent), "has another parent"
            else:
                made, why = self._rebuilt(generation, parent), "rebuilt"
            self._set_stranger_aside(number - 1)
            self._made[number] = made
            self._sha256[number] = manifest.sha256(made.to_bytes())
            self._write(generation, made, why)
        return self._made[min(self._made)].full

    def _fits(self, known: Manifest) -> bool:
        before = known.generation - 1
        if before not in self._sound:
            return True
        return known.chain == self._id and known.parent in (Parent(before, self._sha256[before]), Parent(before, None))

    def _parent(self, number: int) -> Parent | None:
        return Parent(number - 1, self._sha256.get(number - 1)) if number > 1 else None

    def _set_stranger_aside(self, number: int) -> None:
        """Move the manifest of a generation away that is broken and says that it is of another chain.

        The one after it could never be its child.
        """
        generation = self._chain.generations.get(number)
        known = generation.manifest if generation is not None else None
        if generation is None or known is None or number in self._sound or known.chain == self._id:
            return
        name = generation.name(MANIFEST_SUFFIX)
        text = f"{generation.path(MANIFEST_SUFFIX)} set aside: it is of another chain"
        self._findings.deeds.append(Deed(text, partial(_aside, name)))

    def _write(self, generation: Generation, made: Manifest, why: str) -> None:
        name, content = generation.name(MANIFEST_SUFFIX), made.to_bytes()

        def write(chain: LockedChain) -> None:
            chain.replace(name, lambda file: file.write(content))

        self._findings.deeds.append(Deed(f"{generation.path(MANIFEST_SUFFIX)} {why}", write))

    def _rebuilt(self, generation: Generation, parent: Parent | None) -> Manifest:
        """Return a manifest that says what the files show."""
        known = generation.manifest
        _strip(generation)
        delta, table_suffix = generation.delta_suffix, generation.table_suffix
        written = clock.iso(generation.directory.modified(generation.name(delta)))
        with generation.open_table() as table, merge.open_delta(generation) as raw:
            file = CheckedFile(raw)
            last_end = 0
            with merge.read_delta(generation, file) as reader:
                for run in reader.runs():
                    last_end = run.offset + run.length
            stored = StoredFile(delta, self._size(generation, delta), file.checksum())
            made = Manifest(
                chain=self._id,
                generation=generation.number,
                parent=parent,
                full=reader.blocks_carried == table.count,
                delta_format=reader.format,
                delta=stored,
                table=StoredFile(
                    table_suffix, self._size(generation, table_suffix), checksum.of_sha256(table.sha256())
                ),
                digest=generation.digest,
                block_size=table.block_size,
                image_size=reader.image_size,
                blocks=table.count,
                changed_blocks=reader.blocks_carried,
                source=self._source,
                consistency=_UNKNOWN_CONSISTENCY,
                started=written,
                finished=written,
                notes=["rebuilt by blockdiff repair from the files of this generation"],
                versions={"blockdiff": __version__},
            )
        if made.image_size is None:
            made = replace(made, image_size=self._image_size(made, last_end))
        if known is not None:  # what only the old one knew
            made = replace(
                made,
                source=known.source,
                consistency=known.consistency,
                started=known.started,
                finished=known.finished,
                snapshot=known.snapshot,
                quiesced=known.quiesced,
                database=known.database,
            )
        return made

    def _image_size(self, made: Manifest, last_end: int) -> int | None:
        """Return the size of an image whose delta does not know it: the end of its last block, wherever that is."""
        if block_count(last_end, made.block_size) == made.blocks:
            return last_end
        before = self._made.get(made.generation - 1)
        if before is None:
            return None
        return before.image_size if before.blocks == made.blocks else made.blocks * made.block_size

    def _size(self, generation: Generation, suffix: str) -> int:
        size = generation.directory.size_of(generation.name(suffix))
        if size is None:
            raise StorageError(f"{generation.path(suffix)} was removed while it was read")
        return size
