"""The options of ``blockdiff backup``: what they mean together, and which combinations mean nothing."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

from blockdiff.backup import Options, VolumeOptions
from blockdiff.database import accounts
from blockdiff.mysqllock import Limits
from blockdiff.shared.errors import UsageError

#: What needs another option, both by their names as parameters.
_NEEDED_BY = {
    "lvm": (
        *("snapshot_size", "mysql", "lock_wait", "long_query", "max_hold"),
        *("replica_pause", "keep_snapshot", "audit"),
    ),
    "mysql": ("lock_wait", "long_query", "max_hold", "replica_pause"),
    "keep_snapshot": ("audit",),
}


class CommandLine(TypedDict):
    """What click found on the command line; None, False and ``()`` if an option is not there."""

    block_size: int | None
    digest: str | None
    delta_format: str | None
    compression: str
    level: int | None
    full: bool
    period: str | None
    via: str | None
    ssh_options: tuple[str, ...]
    bwlimit: int | None
    streams: int
    lvm: bool
    snapshot_size: str | None
    mysql: str | None
    lock_wait: float | None
    long_query: float | None
    max_hold: float | None
    replica_pause: bool
    before: str | None
    after: str | None
    also: tuple[str, ...]
    keep_snapshot: bool
    audit: bool
    mounted: bool
    dry_run: bool
    verbose: bool
    as_json: bool


def options(given: CommandLine, suffix: str, prefix: Sequence[str] | None) -> Options:
    """Return what a run is asked for; `suffix` is what each NAME ends with, `prefix` that of `arguments.agent_prefix`.

    Raises `UsageError` for options that mean nothing without others, and for a URL that names no database.
    """
    _refuse_lonely(given)
    return Options(
        block_size=given["block_size"],
        digest=given["digest"],
        delta_format=int(given["delta_format"]) if given["delta_format"] else None,
        full=given["full"],
        volumes=_volumes(given) if given["lvm"] else None,
        before=given["before"],
        after=given["after"],
        period=suffix,
        compression=given["compression"],
        level=given["level"],
        transport=given["via"],
        ssh_options=given["ssh_options"],
        bandwidth=given["bwlimit"],
        streams=given["streams"],
        prefix=prefix,
    )


def _volumes(given: CommandLine) -> VolumeOptions:
    return VolumeOptions(
        snapshot_size=given["snapshot_size"] or VolumeOptions.snapshot_size,
        database=None if given["mysql"] is None else accounts.from_url(given["mysql"]),
        limits=Limits(
            given["lock_wait"] or Limits.lock_wait_s,
            given["long_query"] or Limits.long_query_s,
            given["max_hold"] or Limits.max_hold_s,
        ),
        keep=given["keep_snapshot"],
        audit=given["audit"],
        pauses=given["replica_pause"],
    )


def _refuse_lonely(given: Mapping[str, object]) -> None:
    there = [name for name, value in given.items() if value is not None and value is not False]
    for needed, names in _NEEDED_BY.items():
        for name in names if needed not in there else ():
            if name in there:
                raise UsageError(f"--{name.replace('_', '-')} needs --{needed.replace('_', '-')}")
