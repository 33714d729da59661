"""One run: lock the chains, take the moment of their sources, get what changed from the agent, write it, commit it."""

import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from blockdiff import __version__, quiesce
from blockdiff.chain import clock, periods
from blockdiff.chain.clock import now
from blockdiff.chain.commit import LockedChain, NewGeneration, WritableChain
from blockdiff.chain.generations import Chain
from blockdiff.database.accounts import Account
from blockdiff.format import codec
from blockdiff.format.deltawriter import DeltaWriter, Written
from blockdiff.format.manifest import Manifest, Quiesced, SnapshotRecord, Source
from blockdiff.mysqllock import Limits
from blockdiff.plan import ChainOptions, Plan, check_volume, make_plan
from blockdiff.progress import Progress
from blockdiff.quiesce import Moment, Quiesce
from blockdiff.replicapause import Way
from blockdiff.session import consistency, snapshots, streams
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.rules import Opened, Totals, Volume
from blockdiff.session.session import Session
from blockdiff.shared import signals, trace
from blockdiff.shared.blocks import Hasher, digest_named
from blockdiff.shared.errors import UsageError, printable
from blockdiff.transport.address import Address
from blockdiff.transport.connection import Connection


@dataclass(frozen=True)
class VolumeOptions:
    """How logical volumes are taken: through snapshots of `snapshot_size`, under a lock of `database` if there is one.

    With `keep`, the snapshots stay on the host for the next run. `audit`: see `sources.Reading`. With `pauses`, the SQL
    thread of a replica is stopped during the lock.
    """

    snapshot_size: str = "20%"
    database: Account | None = None
    limits: Limits = field(default_factory=Limits)
    keep: bool = False
    audit: bool = False
    pauses: bool = False


@dataclass(frozen=True)
class Options(ChainOptions):
    """What the command line asks for. `volumes` is None if sources are read as they are.

    `before` and `after` are commands that run on the host, before and after the snapshots are made; without snapshots,
    before and after everything is read. `period` is the end of each NAME if a new chain begins automatically each
    month, week or day.
    """

    volumes: VolumeOptions | None = None
    before: str | None = None
    after: str | None = None
    period: str = ""
    compression: str = "gzip"
    level: int | None = None
    transport: str | None = None
    ssh_options: Sequence[str] = ()
    bandwidth: int | None = None
    streams: int = 1
    prefix: Sequence[str] | None = None


@dataclass(frozen=True)
class Result:
    """What a run added to one chain. With `warnings`, the exit status is 3; `recovered` says what was repaired first.

    `planned` are the notes of the `plan.Plan`; `notes` are for the user.
    """

    name: str
    manifest: Manifest
    warnings: list[str]
    recovered: list[str]
    planned: list[str]
    notes: list[str]


@dataclass(frozen=True)
class _Job:
    """What the run does with the chain `name`, for the source at `path` on the host."""

    name: str
    path: str
    plan: Plan


@dataclass(frozen=True)
class _Taken:
    """A source whose moment was taken, its chain, what the agent reported about it, and how the moment was taken."""

    chain: LockedChain
    path: str
    plan: Plan
    volume: Volume
    moment: Moment


@dataclass(frozen=True)
class _Scanned:
    """The result of scanning a source: `new` has its delta and digest table, and is not committed yet."""

    new: NewGeneration
    opened: Opened
    written: Written
    totals: Totals
    bytes_received: int


def backup(name: str, address: Address, options: Options, progress: Progress | None = None) -> Result:
    """Add one generation of the source at `address` to the chain `name`; see `backup_together`."""
    (result,) = backup_together([(name, address.path)], address, options, progress)
    return result


def backup_together(
    targets: Sequence[tuple[str, str]],
    address: Address,
    options: Options,
    progress: Progress | None = None,
    begun: Sequence[Connection] = (),
) -> list[Result]:
    """Add one generation to each of the chains of `targets`, pairs of NAME and path on the host; return the results.

    With snapshots, all sources are taken at one moment. The generations are committed together, after all sources were
    read. `begun` are connections from `transport.begin` that exist already; the run makes any others that it needs.
    Raises a `BlockdiffError` if that was not possible; the chains are then unchanged.
    """
    compress = codec.compressor(options.compression, options.level)
    watcher = progress or Progress()
    connections = deque(begun)

    def connect() -> Session:
        return _session(address, options, connections.popleft() if connections else None)

    with ExitStack() as stack:
        _refuse_twice(targets)
        trace.phase("lock the chain and plan")
        chains = [stack.enter_context(LockedChain(name)) for name, _path in targets]
        jobs = _jobs(chains, targets, address, options, stack)
        started = now()
        trace.phase("meet the agent")
        session = stack.enter_context(connect())
        with _prepared(session, jobs, options) as (quiesced, volumes):
            trace.phase("take the moment")
            moments = _moments(quiesced.around(session), session, [quiesced.holds(index) for index in range(len(jobs))])
        sources = [
            _Taken(chain, job.path, job.plan, volume, moment)
            for chain, job, volume, moment in zip(chains, jobs, volumes, moments)
        ]
        scanned = [_scan(session, source, connect, options, compress, watcher, stack) for source in sources]
        trace.phase("end the session")
        held_s = session.finish()
        trace.phase("commit")
        run = secrets.token_hex(8) if len(jobs) > 1 else None
        results = []
        for source, found in zip(sources, scanned):
            manifest = _manifest(session, source, found, held_s, started, run)
            warnings = [*_warnings(source, found.totals, manifest), *source.moment.warnings]
            warnings += _clock_warnings(source.chain, manifest, options.period)
            notes = [note for note in manifest.notes if note not in source.moment.warnings]
            found.new.commit(manifest)  # last: a later error would be reported as if the run had failed
            results.append(Result(source.chain.name, manifest, warnings, source.chain.notes, source.plan.notes, notes))
        return results


def rehearse(
    targets: Sequence[tuple[str, str]], address: Address, options: Options, begun: Connection | None = None
) -> list[Plan]:
    """Make all checks with which `backup_together` begins, and return what it would do with each of its chains.

    The chain, the connection, the source and the database's login are checked; nothing is locked, made or written.
    Raises the errors that the run would raise.
    """
    codec.compressor(options.compression, options.level)
    with ExitStack() as stack:
        _refuse_twice(targets)
        chains = [stack.enter_context(WritableChain(name)) for name, _path in targets]
        jobs = _jobs(chains, targets, address, options, stack)
        session = stack.enter_context(_session(address, options, begun))
        with _prepared(session, jobs, options, rehearsal=True):
            return [job.plan for job in jobs]


def _session(address: Address, options: Options, begun: Connection | None) -> Session:
    pauses_s = streams.PAUSES_S if options.streams > 1 else ()
    return Session(address, options.transport, options.ssh_options, options.prefix or (), begun, pauses_s)


def _refuse_twice(targets: Sequence[tuple[str, str]]) -> None:
    names = [os.path.realpath(name) for name, _path in targets]
    if len(set(names)) < len(names):
        raise UsageError("two sources of one run cannot go to the same chain", "give each its own NAME")


def _jobs(
    chains: Sequence[Chain], targets: Sequence[tuple[str, str]], address: Address, options: Options, stack: ExitStack
) -> list[_Job]:
    by_volume = options.volumes is not None
    return [
        _Job(chain.name, path, make_plan(chain, address, path, options, stack, by_volume))
        for chain, (_name, path) in zip(chains, targets)
    ]


@contextmanager
def _prepared(
    session: Session, jobs: list[_Job], options: Options, rehearsal: bool = False
) -> Iterator[tuple[Quiesce, list[Volume]]]:
    """Let the agent check all sources; then yield what stops writers, and what the agent reported about each source."""
    for job in jobs:
        session.check_digest(digest_named(job.plan.digest))
    trace.phase("prepare")
    with _quiesce(session, options) as quiesced:
        ready = session.prepare(replace(_request(jobs, quiesced, options), rehearsal=rehearsal))
        for job, volume in zip(jobs, ready.volumes, strict=True):
            check_volume(job.plan, job.name, volume.uuid)
        jobs[0].plan.notes += snapshots.notes(ready.left, session.address)
        quiesced.check(ready, session)
        yield quiesced, ready.volumes


def _moments(moment: Moment, session: Session, holds: Sequence[bool | None]) -> list[Moment]:
    """Return the moment of each source, with a warning if all of them together are not one point in time.

    `holds` says for each source whether its writers were stopped. If they were for all sources but one, the images are
    one point in time: the other sources did not change, so their images also show the moment of that one.
    """
    if len(holds) > 1:
        moment = replace(moment, apart_s=round(session.apart_s, 3))
    if sum(held is not True for held in holds) > 1:
        found = (
            f"the snapshots of this run were made one after the other, within {session.apart_s:.2f} s, while writers"
            " continued: of two writes to different volumes, only the later one may be there; stop them with --before"
            " and --after"
        )
        moment = replace(moment, warnings=[*moment.warnings, found])
    return [moment if held is not False else replace(moment, quiesced=None) for held in holds]


def _quiesced(moment: Moment, held_s: float | None) -> Quiesced | None:
    """Return how writers were stopped; `held_s` is for how many seconds, if they were stopped during the whole scan."""
    if moment.quiesced is None or held_s is None:
        return moment.quiesced
    return replace(moment.quiesced, held_s=held_s)


@contextmanager
def _quiesce(session: Session, options: Options) -> Iterator[Quiesce]:
    wanted = options.volumes
    freezes = options.before is not None
    if wanted is None or wanted.database is None:
        yield Quiesce(freezes)
        return
    way = Way(session.address, options.transport, options.ssh_options, options.prefix or ()) if wanted.pauses else None
    with quiesce.database(session, wanted.database, wanted.limits, freezes, way) as found:
        yield found


def _request(jobs: list[_Job], quiesced: Quiesce, options: Options) -> RunRequest:
    volumes = options.volumes
    sources = []
    for job in jobs:
        last = job.plan.snapshot
        kept = last.uuid if volumes is not None and last is not None and last.kept else ""
        owner, chain = snapshots.owner(job.name, options.period)
        sources.append(SourceRequest(os.fsencode(job.path), owner, chain, kept))
    return RunRequest(
        sources,
        volumes.snapshot_size if volumes is not None else None,
        volumes is not None and volumes.keep,
        options.before,
        options.after,
        quiesced.directories,
        quiesced.datadir,
        low_priority=options.prefix is None,
    )


def _scan(
    session: Session,
    source: _Taken,
    connect: Callable[[], Session],
    options: Options,
    compress: Callable[[bytes | memoryview], bytes],
    watcher: Progress,
    stack: ExitStack,
) -> _Scanned:
    """Let the agent scan the next source, with other agents if `streams` > 1; write its delta and digest table."""
    trace.phase("scan a source")
    plan, before = source.plan, session.bytes_received
    hasher = Hasher(digest_named(plan.digest), plan.block_size)
    volumes = options.volumes or VolumeOptions()
    trusted = volumes.keep and plan.old is not None and plan.snapshot is not None and plan.snapshot.kept
    audited = trusted and (volumes.audit or plan.audit_due)
    hinted = trusted and not audited
    bandwidth = options.bandwidth if options.bandwidth is None else max(1, options.bandwidth // options.streams)
    scan = ScanRequest(plan.block_size, hasher.digest, plan.old, bandwidth, hinted, audited, streams=options.streams)
    with streams.opened(session, scan, source.path, connect) as found:
        watcher.begin(found.opened.size)
        with signals.held():  # no signal between making the files and noting them for removal
            new = stack.enter_context(source.chain.begin(codec.SUFFIXES[options.compression], "." + plan.digest))

        def show(offset: int) -> None:
            watcher.update(offset, found.bytes_received)

        size = found.opened.size
        with DeltaWriter(new.delta, new.table, plan.delta_format, hasher, size, compress, plan.old) as writer:
            for run in found.changes(writer.allocate, show):
                writer.add(run)
            written = writer.finish()
        return _Scanned(new, found.opened, written, found.totals, found.bytes_received - before)


def _manifest(
    session: Session, source: _Taken, found: _Scanned, held_s: float | None, started: str, run: str | None
) -> Manifest:
    opened, written, totals = found.opened, found.written, found.totals
    plan, moment, address = source.plan, source.moment, session.address
    delta, table = found.new.stored()
    snapshot = None
    if opened.snapshot is not None:
        kind = "thin" if source.volume.segtype == "thin" else "thick"
        snapshot = SnapshotRecord(
            opened.snapshot,
            kind,
            round(moment.took_s, 3),
            totals.fill_percent,
            totals.kept,
            opened.extents,
            moment.apart_s,
        )
    quiesced = _quiesced(moment, held_s)
    return Manifest(
        chain=source.chain.chain_id(),
        generation=found.new.number,
        parent=plan.parent,
        full=plan.old is None,
        delta_format=plan.delta_format,
        delta=delta,
        table=table,
        digest=plan.digest,
        block_size=plan.block_size,
        image_size=opened.size,
        blocks=written.blocks,
        changed_blocks=written.changed_blocks,
        source=Source(address.machine, source.path, opened.kind, source.volume.uuid),
        consistency=consistency.of(totals, snapshot is not None, quiesced is not None),
        started=started,
        finished=now(),
        bytes_read=totals.read,
        bytes_received=found.bytes_received,
        run=run,
        snapshot=snapshot,
        quiesced=quiesced,
        database=moment.database,
        notes=[*totals.notes, *moment.notes, *moment.warnings],
        versions=_versions(session),
    )


def _warnings(source: _Taken, totals: Totals, made: Manifest) -> list[str]:
    if totals.left:
        path = printable(source.path)
        return [f"the backup is complete, but a snapshot of {path} is left on the host: {totals.notes[-1]}"]
    found = consistency.warning(source.path, made.source.kind, totals, made.consistency, made.quiesced is not None)
    return [] if found is None else [found]


def _clock_warnings(chain: Chain, made: Manifest, period: str) -> list[str]:
    """Return warnings if the clock went back: during the run, since the run before, or into an earlier period."""
    warnings = []
    parent = chain.generations.get(made.generation - 1)
    before = parent.manifest.finished if parent is not None and parent.manifest is not None else None
    if (why := clock.went_back(made.started, made.finished, before)) is not None:
        warnings.append(f"generation {made.generation}: {why}")
    if (later := periods.later(chain.name, period)) is not None:
        warnings.append(
            f"{printable(later)} exists, and is of a later period than {printable(chain.name)}: is the clock right?"
        )
    return warnings


def _versions(session: Session) -> dict[str, str]:
    return {"blockdiff": __version__, "python": sys.version.split()[0], "host_python": session.host["python"]}
