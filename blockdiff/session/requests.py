"""What the server asks the agent for: a run, its sources, and how to scan each."""

from collections.abc import Sequence
from dataclasses import dataclass

from blockdiff.format.digesttable import TableReader
from blockdiff.shared.blocks import Digest


@dataclass(frozen=True)
class SourceRequest:
    """A source of a run: its path on the host, whose it is, and the LV UUID of the snapshot kept for it.

    `owner` is the same word for all runs that take over each other's kept snapshots, `chain` says for people whose
    they are.
    """

    path: bytes
    owner: str = ""
    chain: str = ""
    kept: str = ""


@dataclass(frozen=True)
class RunRequest:
    """What a run takes, at one moment if through snapshots of `snapshot_size` (None: as it is).

    `keep` leaves them on the host. `before` and `after` are commands to run on the host around the making of the
    snapshots, or if there are none around the reading; `directories` are places on the host about which the run must
    know on which of the sources they lie. A `rehearsal` ends when all was checked.
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

    This is number `stream`, from 0, of `streams` that scan it together (`blockdiff.session.streams`). The rest is about
    thin volumes: see `sources.Reading`.
    """

    block_size: int
    digest: Digest
    old: TableReader | None = None
    bandwidth: int | None = None
    hinted: bool = False
    audited: bool = False
    stream: int = 0
    streams: int = 1
