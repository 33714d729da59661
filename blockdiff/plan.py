"""Decide what a run will do with a chain, and refuse a chain on which it must not build."""

from contextlib import ExitStack
from dataclasses import dataclass, field

from blockdiff import merge
from blockdiff.chain.generations import Chain, Generation
from blockdiff.chain.inventory import MANIFEST_SUFFIX
from blockdiff.format.digesttable import TableReader
from blockdiff.format.manifest import Parent, SnapshotRecord, Source
from blockdiff.shared.blocks import check_block_size
from blockdiff.shared.errors import ChainError, DamagedError, printable
from blockdiff.transport.address import Address

DEFAULT_BLOCK_SIZE = 64 << 10
DEFAULT_DIGEST = "sha256"
DEFAULT_FORMAT = 2

#: After this many runs that read only what thin_delta reported as changed, the next run reads everything.
HINTED_RUNS = 9


@dataclass(frozen=True)
class ChainOptions:
    """What the command line asks for a chain; None means the chain's own value, or the default for a new chain."""

    block_size: int | None = None
    digest: str | None = None
    delta_format: int | None = None
    full: bool = False


@dataclass
class Plan:
    """What one run will do. `old` is the digest table that it builds on, None for a full generation.

    `snapshot` is the snapshot of the generation before, `volume` the LV UUID that the source must have (None: any).
    `elsewhere` is set if the source has another path than the generation before: the error to raise unless it has this
    LV UUID. `notes` say which settings the chain keeps although the command line asks for others, and which snapshots
    no run needs.
    """

    block_size: int
    digest: str
    delta_format: int
    old: TableReader | None
    parent: Parent | None
    snapshot: SnapshotRecord | None = None
    volume: str | None = None
    elsewhere: ChainError | None = None
    audit_due: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def number(self) -> int:
        """The number of the new generation."""
        return 1 if self.parent is None else self.parent.generation + 1


def make_plan(
    chain: Chain, address: Address, path: str, options: ChainOptions, stack: ExitStack, by_volume: bool = False
) -> Plan:
    """Return the plan for a run that adds the source at `path` to a chain; `stack` closes the files that this opens.

    With `by_volume`, the host will report the LV UUID of the source, and `check_volume` must be called with it: so the
    same volume may have another path. Raises `ChainError` or `DamagedError` if the source cannot be added.
    """
    last = chain.last()
    base = chain.generations.get(last)
    parent = Parent(last, base.manifest_sha256 if base is not None else None) if last else None
    if last == 0 or options.full:
        return _full_plan(base, parent, options)
    if base is None:
        raise DamagedError(
            f"{chain.path_of('.ver')} says {last}, but generation {last} is missing",
            "restore its files from a copy, or store everything again in this chain with --full",
        )
    _check_base(chain, base)
    here = Source(address.machine, path, "")
    elsewhere = _refusal(chain, here)
    if elsewhere is not None and not (by_volume and _has_volume_there(base, here)):
        raise elsewhere
    old = stack.enter_context(base.open_table())
    plan = Plan(old.block_size, base.digest, _format_of(base), old, parent)
    if base.manifest is not None:
        plan.snapshot, plan.volume = base.manifest.snapshot, base.manifest.source.volume
        plan.elsewhere = elsewhere
    plan.audit_due = _audit_is_due(chain)
    plan.notes += _unchanged(plan, options)
    return plan


def _full_plan(base: Generation | None, parent: Parent | None, options: ChainOptions) -> Plan:
    known = base.manifest if base is not None else None
    block_size = options.block_size or (known.block_size if known else DEFAULT_BLOCK_SIZE)
    digest = options.digest or (known.digest if known else DEFAULT_DIGEST)
    delta_format = options.delta_format or (known.delta_format if known else DEFAULT_FORMAT)
    check_block_size(block_size)
    return Plan(block_size, digest, delta_format, None, parent, known.snapshot if known else None)


def _has_volume_there(base: Generation, here: Source) -> bool:
    """Return whether a generation is of a logical volume of the same host whose LV UUID is known."""
    known = base.manifest.source if base.manifest is not None else None
    return known is not None and known.volume is not None and known.host == here.host


def _refusal(chain: Chain, here: Source) -> ChainError | None:
    """Return the error for a source that is at another place than the source of the newest manifest; else None."""
    known = [generation.manifest.source for generation in chain.generations.values() if generation.manifest]
    if not known or known[-1].kind == "command" or known[-1].same_place(here):
        return None
    return ChainError(
        f"{printable(chain.name)} holds backups of {printable(str(known[-1]))}, not of {printable(str(here))}",
        "use another NAME; if the same source was renamed: blockdiff repair NAME --source SOURCE; "
        "if this source replaces the other: --full",
    )


def check_volume(plan: Plan, name: str, found: str | None) -> None:
    """Refuse a volume that is not the volume of the chain; raises `ChainError`.

    The LV UUID `found` decides: a volume with the old path but another UUID is refused, and the same volume may have a
    new path.
    """
    if plan.elsewhere is not None:
        if found != plan.volume:
            raise plan.elsewhere
        plan.notes.append("the source is the chain's volume under another path: its LV UUID is the same")
        return
    if plan.volume is not None and found is not None and plan.volume != found:
        raise ChainError(
            f"{printable(name)} holds backups of the volume with the LV UUID {plan.volume}, this one has {found}",
            "it was created again under the old name: use another NAME, or --full to continue this chain",
        )


def _audit_is_due(chain: Chain) -> bool:
    """Return whether the last `HINTED_RUNS` runs all trusted thin_delta."""
    known = [g.manifest for g in list(chain.generations.values())[-HINTED_RUNS:]]
    hinted = [m for m in known if m is not None and m.snapshot is not None and m.snapshot.extents == "changed"]
    return len(hinted) >= HINTED_RUNS


def _check_base(chain: Chain, base: Generation) -> None:
    """Refuse to build on a generation that could not be restored: a cheap check of all that it needs."""
    needed = chain.needed(base.number)
    for generation in needed:
        generation.check_files()
        chain.check_parent(generation)
        chain.check_manifest(generation)
    oldest = needed[-1]
    if chain.needs_older(oldest):
        raise DamagedError(
            f"generation {oldest.number - 1} of {printable(chain.name)} is missing",
            "restore its files from a copy, or store everything again in this chain with --full",
        )


def _format_of(base: Generation) -> int:
    if base.manifest is not None:
        return base.manifest.delta_format
    with merge.open_delta(base) as file, merge.read_delta(base, file) as reader:
        found = reader.format
    if found != 1:  # only the original's chains have no manifests
        raise DamagedError(
            f"{base.path(MANIFEST_SUFFIX)} is missing", "restore it from a copy, or store everything again with --full"
        )
    return found


def _unchanged(plan: Plan, options: ChainOptions) -> list[str]:
    asked = (
        ("block size", options.block_size, plan.block_size),
        ("digest", options.digest, plan.digest),
        ("format", options.delta_format, plan.delta_format),
    )
    return [
        f"the chain keeps its {what} {own} (asked for: {wanted}; --full would change it)"
        for what, wanted, own in asked
        if wanted is not None and wanted != own
    ]
