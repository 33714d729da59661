"""What the server asks the agent for: a run, its sources, and how to scan each."""

from collections.abc import Sequence
from dataclasses import dataclass

from blockdiff.format.digesttable import TableReader
from blockdiff.shared.blocks import Digest


@dataclass(frozen=True)
class SourceRequest:
    """A source of a run: its path on the host, the owner of its snapshots, and the LV UUID of the snapshot kept for it.

    `owner` is the same word for all runs that may use each other's kept snapshots; `chain` names the owner for people.
    """

    path: bytes
    owner: str = ""
    chain: str = ""
    kept: str = ""


@dataclass(frozen=True)
class RunRequest:
    """What a run takes: through snapshots of `snapshot_size`, all at one moment, or as it is (`snapshot_size` is None).

    `keep` leaves the snapshots on the host. `before` and `after` are commands that run on the host before and after the
    snapshots are made; without snapshots, before and after everything is read. For each of `directories`, the agent is
    to report on which of the sources it is; `datadir` is a database's data directory. A `rehearsal` only makes checks.
    """

    sources: Sequence[SourceRequest]
    snapshot_size: str | None = None
    keep: bool = False
    before: str | None = None
    after: str | None = None
    directories: Sequence[str] = ()
    datadir: str | None = None
    low_priority: bool = True
    rehearsal: bool = False


@dataclass(frozen=True)
class ScanRequest:
    """How to scan a source: `old` is the previous digest table, None for a full generation; `bandwidth` in bytes/s.

    This is number `stream`, from 0, of the `streams` that scan it together (`blockdiff.session.streams`). `hinted` and
    `audited` are for thin volumes: see `sources.Reading`.
    """

    block_size: int
    digest: Digest
    old: TableReader | None = None
    bandwidth: int | None = None
    hinted: bool = False
    audited: bool = False
    stream: int = 0
    streams: int = 1
