"""One run: lock the chain, ask the agent for what changed, write it down, commit it."""

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from blockdiff import __version__, codec, merge
from blockdiff.address import Address
from blockdiff.blocks import Hasher, check_block_size, digest_named
from blockdiff.chain import MANIFEST_SUFFIX, Generation
from blockdiff.clock import now
from blockdiff.commit import LockedChain
from blockdiff.deltafile import TableReader
from blockdiff.deltawriter import DeltaWriter
from blockdiff.errors import ChainError, DamagedError, printable
from blockdiff.manifest import Manifest, Parent, Source
from blockdiff.progress import Progress
from blockdiff.session import Request, Session, Totals

DEFAULT_BLOCK_SIZE = 64 << 10
DEFAULT_DIGEST = "sha256"
DEFAULT_FORMAT = 2

# What is known of the image's consistency: nothing wrote to the file while it was read; something did; nobody can tell.
STILL = "still"
CHANGING = "changing"
LIVE = "live"


@dataclass(frozen=True)
class Options:
    """What the command line asks for; None leaves the choice to the chain, or to the defaults of a new one."""

    block_size: int | None = None
    digest: str | None = None
    delta_format: int | None = None
    compression: str = "gzip"
    level: int | None = None
    full: bool = False
    transport: str | None = None
    ssh_options: Sequence[str] = ()
    bandwidth: int | None = None
    prefix: Sequence[str] | None = None


@dataclass(frozen=True)
class Result:
    """What a run made. `warnings` make it exit 3; `recovered` is what it had to put in order before.

    `notes` are for whoever watches.
    """

    name: str
    manifest: Manifest
    warnings: list[str]
    recovered: list[str]
    notes: list[str]


@dataclass
class _Plan:
    """What one run will do, decided from the options and the chain."""

    block_size: int
    digest: str
    delta_format: int
    old: TableReader | None
    parent: Parent | None
    notes: list[str] = field(default_factory=list)


def backup(name: str, address: Address, options: Options, progress: Progress | None = None) -> Result:
    """Add one generation to the chain `name` and return what was made.

    Raises a `BlockdiffError` when that was not possible; the chain is then as it was.
    """
    watcher = progress or Progress()
    compress = codec.compressor(options.compression, options.level)
    with ExitStack() as stack:
        chain = stack.enter_context(LockedChain(name))
        started = now()
        plan = _plan(chain, address, options, stack)
        hasher = Hasher(digest_named(plan.digest), plan.block_size)
        session = stack.enter_context(
            Session(address, options.transport, options.ssh_options, prefix=options.prefix or ())
        )
        request = Request(
            os.fsencode(address.path),
            plan.block_size,
            hasher.digest,
            plan.old,
            options.bandwidth,
            low_priority=options.prefix is None,
        )
        image_size = session.open_source(request)
        watcher.begin(image_size)
        new = stack.enter_context(chain.begin(codec.SUFFIXES[options.compression], "." + plan.digest))
        writer = DeltaWriter(new.delta, new.table, plan.delta_format, hasher, image_size, compress, plan.old)
        runs = session.changes(request, writer.allocate, lambda offset: watcher.update(offset, session.bytes_received))
        written = writer.write(runs)
        assert session.totals is not None, "the session ended without totals"
        delta, table = new.stored()
        manifest = Manifest(
            chain=chain.chain_id(),
            generation=new.number,
            parent=plan.parent,
            full=plan.old is None,
            delta_format=plan.delta_format,
            delta=delta,
            table=table,
            digest=plan.digest,
            block_size=plan.block_size,
            image_size=image_size,
            blocks=written.blocks,
            changed_blocks=written.changed_blocks,
            source=Source(address.machine, address.path, session.source_kind),
            consistency=_consistency(session.totals),
            started=started,
            finished=now(),
            bytes_read=session.totals.read,
            bytes_received=session.bytes_received,
            versions=_versions(session),
        )
        new.commit(manifest)
        return Result(name, manifest, _warnings(address, session.totals), chain.notes, plan.notes)


def _plan(chain: LockedChain, address: Address, options: Options, stack: ExitStack) -> _Plan:
    last = chain.last()
    base = chain.generations.get(last)
    parent = Parent(last, base.manifest_sha256 if base is not None else None) if last else None
    if last == 0 or options.full:
        return _full_plan(base, parent, options)
    if base is None:
        raise DamagedError(
            f"{chain.path_of('.ver')} says {last}, but generation {last} is not there",
            "restore its files from a copy, or begin anew inside the chain with --full",
        )
    _check_base(chain, base)
    _check_source(chain, address)
    old = stack.enter_context(base.open_table())
    plan = _Plan(old.block_size, base.digest, _format_of(base), old, parent)
    plan.notes += _kept_notes(plan, options)
    return plan


def _full_plan(base: Generation | None, parent: Parent | None, options: Options) -> _Plan:
    known = base.manifest if base is not None else None
    block_size = options.block_size or (known.block_size if known else DEFAULT_BLOCK_SIZE)
    digest = options.digest or (known.digest if known else DEFAULT_DIGEST)
    delta_format = options.delta_format or (known.delta_format if known else DEFAULT_FORMAT)
    check_block_size(block_size)
    return _Plan(block_size, digest, delta_format, None, parent)


def _check_source(chain: LockedChain, address: Address) -> None:
    """Refuse another source than that of the newest manifest."""
    known = [generation.manifest.source for generation in chain.generations.values() if generation.manifest]
    here = Source(address.machine, address.path, "")
    if not known or known[-1].kind == "command" or known[-1].same_place(here):
        return
    raise ChainError(
        f"{printable(chain.name)} holds backups of {printable(str(known[-1]))}, not of {printable(str(here))}",
        "use another NAME, or say --full if this source really takes the place of the other",
    )


def _check_base(chain: LockedChain, base: Generation) -> None:
    """Refuse to build on what could not be restored: a cheap look at all that the new generation would need."""
    needed = chain.needed(base.number)
    for generation in needed:
        generation.check_files()
        chain.check_parent(generation)
        chain.check_manifest(generation)
    oldest = needed[-1]
    if oldest.number > 1 and not (oldest.manifest is not None and oldest.manifest.full):
        raise DamagedError(
            f"generation {oldest.number - 1} of {printable(chain.name)} is missing",
            "restore its files from a copy, or begin anew inside the chain with --full",
        )


def _format_of(base: Generation) -> int:
    if base.manifest is not None:
        return base.manifest.delta_format
    with merge.open_delta(base) as file, merge.read_delta(base, file) as reader:
        found = reader.format
    if found != 1:  # only the original's chains do without
        raise DamagedError(
            f"{base.path(MANIFEST_SUFFIX)} is missing", "restore it from a copy, or begin anew with --full"
        )
    return found


def _kept_notes(plan: _Plan, options: Options) -> list[str]:
    asked = (
        ("block size", options.block_size, plan.block_size),
        ("digest", options.digest, plan.digest),
        ("format", options.delta_format, plan.delta_format),
    )
    return [
        f"the chain keeps its {what} {kept} (asked for: {wanted}; --full would change it)"
        for what, wanted, kept in asked
        if wanted is not None and wanted != kept
    ]


def _consistency(totals: Totals) -> str:
    if totals.touched is None:
        return LIVE
    return CHANGING if totals.touched else STILL


def _warnings(address: Address, totals: Totals) -> list[str]:
    if not totals.touched:
        return []
    path = printable(address.path)
    return [f"{path} was written to while it was read; this generation may mix several moments: back up a snapshot"]


def _versions(session: Session) -> dict[str, str]:
    return {"blockdiff": __version__, "python": platform.python_version(), "host_python": session.host["python"]}
