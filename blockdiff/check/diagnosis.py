"""Find out which generations of a chain can be restored, and what can be rebuilt from the files that are left.

Only reads. A generation is sound if the digests of its blocks are those of its table. A table that is lost is
rebuilt from the deltas; what it proves counts as well. If a manifest is missing or does not fit, its generation is
examined again without any manifest: the files prove what they hold.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.temporary import UnnamedFile
from blockdiff.check.verify import Verdict, Verifier
from blockdiff.shared.errors import StorageError

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Diagnosis:
    """What is known of one generation.

    `generation` is what its files are, with the digest table that was made of the deltas, if there is such a `table`;
    None if it has no file. `error` says why it cannot be restored, None if it can. `has_manifest` is whether it
    has the manifest of a sound generation.
    """

    generation: Generation | None
    error: str | None
    has_manifest: bool = False
    table: UnnamedFile | None = None


def diagnose(chain: Chain, last: int, files: ExitStack, advance: Advance) -> dict[int, Diagnosis]:
    """Return what is known of each generation up to `last`, complete or not, by number.

    A gap has one entry, for its first generation. `files` keeps the tables open. `advance` gets the bytes that were
    read. Raises `StorageError` if something cannot be read now, which need not be broken.
    """
    if not last:
        return {}
    tables: dict[int, UnnamedFile] = {}
    while True:
        seen = chain.seen_with(
            {n: each.with_table(tables[n]) if n in tables else each for n, each in chain.generations.items()}
        )
        with Verifier(seen, advance, tables=files) as verifier:
            verdicts = _verdicts(verifier, last)
        made = {n: verdict.table for n, verdict in verdicts.items() if verdict.table is not None}
        if not made:
            break
        tables.update(made)  # they may prove other generations
    sound = {n for n, verdict in verdicts.items() if verdict.error is None}
    by_files = _sound_by_files(seen, sound, last, advance) if len(sound) < len(verdicts) else set()
    found = {}
    for n, verdict in verdicts.items():
        generation = seen.generations.get(n)
        error = None if n in by_files or verdict.error is None else verdict.error.message
        has_manifest = n in sound and generation is not None and generation.manifest is not None
        found[n] = Diagnosis(generation, error, has_manifest, tables.get(n))
    return found


def _sound_by_files(chain: Chain, sound: set[int], last: int, advance: Advance) -> set[int]:
    """Return the generations that can be restored if no manifest is believed.

    A generation of another chain may be sound, but it is not ours.
    """
    bare = chain.seen_with({n: each.bare() for n, each in chain.generations.items()})
    ours = {chain.generations[n].chain_id for n in sound} - {None}
    with Verifier(bare, advance, needs_manifests=False) as verifier:
        verdicts = _verdicts(verifier, last)
    return {
        n
        for n, verdict in verdicts.items()
        if verdict.error is None and (not ours or chain.generations[n].chain_id in {None, *ours})
    }


def _verdicts(verifier: Verifier, last: int) -> dict[int, Verdict]:
    found = {}
    for verdict in verifier.all(last):
        for error in (verdict.error, verdict.error and verdict.error.__cause__):
            if isinstance(error, StorageError):  # what cannot be read now need not be broken
                raise error
        found[verdict.number] = verdict
    return found
