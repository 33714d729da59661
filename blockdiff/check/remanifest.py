"""The manifests of sound generations: each must fit its files and the manifest before it."""

import uuid
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from blockdiff import __version__, merge
from blockdiff.chain import clock
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import MANIFEST_SUFFIX
from blockdiff.check.diagnosis import Diagnosis
from blockdiff.check.verify import CheckedFile
from blockdiff.format import checksum, manifest
from blockdiff.format.manifest import Manifest, Parent, Source, StoredFile
from blockdiff.shared.blocks import block_count
from blockdiff.shared.errors import StorageError

#: What a rebuilt manifest says of a source that is not known; like that of a command, any can follow.
_UNKNOWN_SOURCE = Source(None, "unknown", "command")
#: What it says of the moment.
_UNKNOWN_CONSISTENCY = "unknown"


class Change(NamedTuple):
    """A manifest that is to be written, or set aside if it has no `content`; `why` is for a sentence."""

    path: str
    name: str
    content: bytes | None
    why: str


class Manifests:
    """The manifests that a chain gets, of which the generations in `sound` can be restored."""

    def __init__(self, chain: Chain, sound: dict[int, Diagnosis]) -> None:
        self._chain = chain
        self._sound = sound
        known = [generation.manifest for generation in chain.generations.values() if generation.manifest is not None]
        known = [each for each in known if each.generation in sound] or known  # sound ones know better
        self._id = known[-1].chain if known else uuid.uuid4().hex
        self._source = known[-1].source if known else _UNKNOWN_SOURCE
        self._sha256: dict[int, str | None] = {}
        self._made: dict[int, Manifest] = {}

    def oldest_is_full(self) -> bool:
        """Return whether the oldest of the generations needs none before it, when `changes` has gone through all."""
        return self._made[min(self._made)].full

    def changes(self) -> Iterator[Change]:
        """Yield what is to change, from the oldest on: a new manifest changes what the next must say of its parent."""
        for number, found in sorted(self._sound.items()):
            generation = found.generation
            assert generation is not None, "what is sound is there"
            known = generation.manifest if found.has_manifest else None
            if known is not None and self._fits(known):
                self._sha256[number], self._made[number] = generation.manifest_sha256, known
                continue
            parent = Parent(number - 1, self._sha256.get(number - 1)) if number > 1 else None
            if known is not None:
                made, why = replace(known, chain=self._id, parent=parent), "has another parent"
            else:
                made, why = self._rebuilt(generation, parent), "rebuilt"
            yield from self._stranger(number - 1)
            content = made.to_bytes()
            self._made[number], self._sha256[number] = made, manifest.sha256(content)
            yield Change(generation.path(MANIFEST_SUFFIX), generation.name(MANIFEST_SUFFIX), content, why)

    def _fits(self, known: Manifest) -> bool:
        before = known.generation - 1
        if before not in self._sound:
            return True
        return known.chain == self._id and known.parent in (Parent(before, self._sha256[before]), Parent(before, None))

    def _stranger(self, number: int) -> Iterator[Change]:
        """Yield the manifest of a generation that is broken and says that it is of another chain.

        The one after it could never be its child.
        """
        generation = self._chain.generations.get(number)
        known = generation.manifest if generation is not None else None
        if generation is None or known is None or number in self._sound or known.chain == self._id:
            return
        path, name = generation.path(MANIFEST_SUFFIX), generation.name(MANIFEST_SUFFIX)
        yield Change(path, name, None, "set aside: it is of another chain")

    def _rebuilt(self, generation: Generation, parent: Parent | None) -> Manifest:
        """Return a manifest that says what the files show, and what only the old one knows."""
        made = self._of_files(generation.bare(), parent)
        known = generation.manifest
        if known is None:
            return made
        return replace(
            made,
            source=known.source,
            consistency=known.consistency,
            started=known.started,
            finished=known.finished,
            snapshot=known.snapshot,
            quiesced=known.quiesced,
            database=known.database,
        )

    def _of_files(self, generation: Generation, parent: Parent | None) -> Manifest:
        delta, table_suffix = generation.delta_suffix, generation.table_suffix
        written = clock.iso(generation.directory.modified(generation.name(delta)))
        with generation.open_table() as table, merge.open_delta(generation) as raw:
            file = CheckedFile(raw)
            last_end = 0
            with merge.read_delta(generation, file) as reader:
                for run in reader.runs():
                    last_end = run.offset + run.length
            stored = StoredFile(delta, _size(generation, delta), file.checksum())
            made = Manifest(
                chain=self._id,
                generation=generation.number,
                parent=parent,
                full=reader.blocks_carried == table.count,
                delta_format=reader.format,
                delta=stored,
                table=StoredFile(table_suffix, _size(generation, table_suffix), checksum.of_sha256(table.sha256())),
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
        return made

    def _image_size(self, made: Manifest, last_end: int) -> int | None:
        """Return the size of an image whose delta does not know it: the end of its last block, wherever that is."""
        if block_count(last_end, made.block_size) == made.blocks:
            return last_end
        before = self._made.get(made.generation - 1)
        if before is None:
            return None
        return before.image_size if before.blocks == made.blocks else made.blocks * made.block_size


def _size(generation: Generation, suffix: str) -> int:
    size = generation.stored_size(suffix)
    if size is None:
        raise StorageError(f"{generation.path(suffix)} was removed while it was read")
    return size
