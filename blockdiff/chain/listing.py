"""What `blockdiff list` shows of a chain: one entry for each generation. Deltas and digest tables are not read."""

from dataclasses import dataclass

from blockdiff.chain import periods
from blockdiff.chain.clock import iso
from blockdiff.chain.generations import Chain, Generation, missing
from blockdiff.database.coordinates import Coordinates
from blockdiff.format.manifest import Quiesced, SnapshotRecord
from blockdiff.shared.blocks import DIGEST_SIZES
from blockdiff.shared.errors import DamagedError, StorageError

OK = "ok"
NO_MANIFEST = "no manifest"
DAMAGED = "damaged"
INCOMPLETE = "incomplete"
MISSING = "missing"


@dataclass(frozen=True)
class Entry:
    """One generation, or a gap. Sizes are in bytes; what is not known is None. `problem` explains a bad state."""

    generation: int
    when: str | None
    full: bool | None
    image_size: int | None
    changed: int | None
    stored: int | None
    consistency: str | None
    state: str
    problem: str | None = None
    source: str | None = None
    digest: str | None = None
    block_size: int | None = None
    format: int | None = None
    snapshot: SnapshotRecord | None = None
    quiesced: Quiesced | None = None
    database: Coordinates | None = None
    started: str | None = None


def entries(chain: Chain) -> list[Entry]:
    """Return an entry for each existing generation, committed or not, and for each gap (see `Chain.spans`)."""
    if not chain.generations:
        return []
    last = _last(chain)
    return [_entry(chain, *span, last) for span in chain.spans(max(last, *chain.generations))]


def _last(chain: Chain) -> int:
    try:
        return chain.last()
    except DamagedError:
        return max(chain.generations)


def _entry(chain: Chain, number: int, end: int, last: int) -> Entry:
    generation = chain.generations.get(number)
    if generation is None:
        return Entry(number, None, None, None, None, None, None, MISSING, missing(number, end).message)
    state, problem = _state(chain, generation, last)
    known = generation.manifest
    stored = generation.stored_bytes()
    if known is None:
        return Entry(
            number, _written(generation), None, None, None, stored, None, state, problem, digest=_digest(generation)
        )
    return Entry(
        generation=number,
        when=known.finished,
        full=known.full,
        image_size=known.image_size,
        changed=known.changed_bytes,
        stored=stored,
        consistency=known.consistency,
        state=state,
        problem=problem,
        source=str(known.source),
        digest=known.digest,
        block_size=known.block_size,
        format=known.delta_format,
        snapshot=known.snapshot,
        quiesced=known.quiesced,
        database=known.database,
        started=known.started,
    )


def _state(chain: Chain, generation: Generation, last: int) -> tuple[str, str | None]:
    if generation.number > last:
        return INCOMPLETE, "a run was cut off here; the next one moves these files aside"
    try:
        generation.check_files()
        chain.check_parent(generation)
        chain.check_manifest(generation)
    except (DamagedError, StorageError) as error:  # a file that cannot be read must not hide the other generations
        return DAMAGED, error.message
    return (NO_MANIFEST, None) if generation.manifest is None else (OK, None)


def _written(generation: Generation) -> str | None:
    seconds = periods.written(generation)
    return None if seconds is None else iso(seconds)


def _digest(generation: Generation) -> str | None:
    found = [name for name in DIGEST_SIZES if "." + name in generation.suffixes]
    return found[0] if len(found) == 1 else None
