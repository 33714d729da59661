"""What the options about logical volumes and databases mean together."""

from collections.abc import Mapping

from blockdiff.backup import Volumes
from blockdiff.database import accounts
from blockdiff.mysqllock import Limits
from blockdiff.shared.errors import UsageError


def volume_options(given: Mapping[str, object]) -> Volumes | None:
    """Return what the options of `blockdiff backup`, by their names, ask for; None without ``--lvm``.

    Raises `UsageError` for options that mean nothing without others.
    """
    asked = {name: value for name, value in given.items() if value is not None and value is not False}
    if not asked.pop("lvm", False):
        _need("--lvm", asked)
        return None
    if "audit" in asked and "keep_snapshot" not in asked:
        _need("--keep-snapshot", {"audit": True})
    limits: dict[str, object] = {
        name: asked.pop(name) for name in ("lock_wait", "long_query", "max_hold") if name in asked
    }
    if limits and "mysql" not in asked:
        _need("--mysql", limits)
    if "replica_pause" in asked and "mysql" not in asked:
        _need("--mysql", {"replica_pause": True})
    url = asked.get("mysql")
    return Volumes(
        snapshot_size=_text(asked.get("snapshot_size")) or "20%",
        database=accounts.from_url(str(url), ssh_user="") if url is not None else None,
        limits=Limits(**{name + "_s": float(str(value)) for name, value in limits.items()}),
        keep="keep_snapshot" in asked,
        audit="audit" in asked,
        pauses="replica_pause" in asked,
    )


def _need(option: str, asked: Mapping[str, object]) -> None:
    for name in asked:
        raise UsageError(f"--{name.replace('_', '-')} means nothing without {option}")


def _text(value: object) -> str | None:
    return None if value is None else str(value)
