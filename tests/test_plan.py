"""What a run decides to do with a chain, as far as it depends on the volume and on the runs before."""

import dataclasses
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdiff import plan
from blockdiff.chain.commit import LockedChain
from blockdiff.format import manifest
from blockdiff.format.manifest import Manifest, Parent, SnapshotRecord
from blockdiff.plan import HINTED_RUNS, ChainOptions, Plan
from blockdiff.shared.errors import ChainError
from blockdiff.transport.address import Address
from tests import chains
from tests.chains import SmallChain

ALL = SnapshotRecord("all", "thin", 0.1, None, True, None)
HINTED = SnapshotRecord("hinted", "thin", 0.1, None, True, "changed")
AUDITED = SnapshotRecord("audited", "thin", 0.1, None, True, "audited")


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.new_chain(tmp_path)


def as_if(chain: SmallChain, snapshots: list[SnapshotRecord | None], volume: str | None = "uuid") -> None:
    """Make a generation for each snapshot, whose manifest says that it was read through that."""
    parent: Parent | None = None
    for number, snapshot in enumerate(snapshots, 1):
        chain.add(b"image %d" % number)
        path = chain.file(f".{number}.json")
        made: Manifest = manifest.from_bytes(path.read_bytes(), str(path))
        source = dataclasses.replace(made.source, volume=volume)
        content = dataclasses.replace(made, parent=parent, snapshot=snapshot, source=source).to_bytes()
        path.unlink()
        path.write_bytes(content)
        parent = Parent(number, manifest.sha256(content))


def planned(
    chain: SmallChain, full: bool = False, path: str = "", by_volume: bool = False, host: str | None = None
) -> Plan:
    path = path or str(chain.source)
    with LockedChain(chain.name) as locked, ExitStack() as stack:
        return plan.make_plan(locked, Address(host, path), path, ChainOptions(full=full), stack, by_volume)


def test_a_new_chain_takes_any_volume(chain: SmallChain) -> None:
    plan.check_volume(planned(chain), "disk", "other")
    plan.check_volume(planned(chain), "disk", None)


def test_another_volume_of_the_same_name_is_refused(chain: SmallChain) -> None:
    as_if(chain, [ALL, ALL])
    found = planned(chain)
    assert (found.volume, found.snapshot) == ("uuid", ALL)
    plan.check_volume(found, "disk", "uuid")
    with pytest.raises(ChainError) as caught:
        plan.check_volume(found, "disk", "other")
    assert caught.value.message == "disk holds backups of the volume with the LV UUID uuid, this one has other"
    assert caught.value.hint == (
        "it was created again under the old name: use another NAME, or --full to continue this chain"
    )


def test_a_full_generation_takes_another_volume_and_knows_what_was_kept(chain: SmallChain) -> None:
    """What the last run kept on the host is put away by this one."""
    as_if(chain, [ALL])
    found = planned(chain, full=True)
    plan.check_volume(found, "disk", "other")
    assert (found.old, found.snapshot, found.audit_due) == (None, ALL, False)


def test_a_volume_may_be_read_as_it_is_or_through_a_snapshot_from_now_on(chain: SmallChain) -> None:
    """Nobody knows the UUID of a source that is read as it is."""
    as_if(chain, [ALL])
    plan.check_volume(planned(chain), "disk", None)
    live = SmallChain(chain.directory, chain.source, "live")
    as_if(live, [None], volume=None)
    plan.check_volume(planned(live), "live", "other")


def test_the_same_volume_may_have_another_path(chain: SmallChain) -> None:
    as_if(chain, [ALL])
    found = planned(chain, path="/dev/dm-3", by_volume=True)
    plan.check_volume(found, "disk", "uuid")
    assert found.notes == ["the source is the chain's volume under another path: its LV UUID is the same"]


@pytest.mark.parametrize("uuid", ["other", None])
def test_another_volume_at_another_path_is_refused(chain: SmallChain, uuid: str | None) -> None:
    as_if(chain, [ALL])
    with pytest.raises(ChainError, match=f"disk holds backups of {chain.source}, not of /dev/dm-3"):
        plan.check_volume(planned(chain, path="/dev/dm-3", by_volume=True), "disk", uuid)


@pytest.mark.parametrize(
    ("volume", "by_volume", "host"), [("uuid", False, None), (None, True, None), ("uuid", True, "other")]
)
def test_another_path_is_refused_at_once_where_no_uuid_can_tell(
    chain: SmallChain, volume: str | None, by_volume: bool, host: str | None
) -> None:
    as_if(chain, [ALL], volume)
    with pytest.raises(ChainError, match=r"disk holds backups of .*, not of .*/dev/dm-3"):
        planned(chain, path="/dev/dm-3", by_volume=by_volume, host=host)


@pytest.mark.parametrize(
    ("snapshots", "due"),
    [
        ([], False),
        ([ALL], False),
        ([ALL, *[HINTED] * (HINTED_RUNS - 1)], False),
        ([ALL, *[HINTED] * HINTED_RUNS], True),
        ([ALL, *[HINTED] * (HINTED_RUNS + 1)], True),
        ([ALL, *[HINTED] * HINTED_RUNS, AUDITED], False),
        ([ALL, *[HINTED] * HINTED_RUNS, AUDITED, *[HINTED] * (HINTED_RUNS - 1)], False),
        ([ALL, *[HINTED] * 5, None, *[HINTED] * 5], False),
    ],
)
def test_an_audit_is_due_after_so_many_runs_that_trusted_a_hint(
    chain: SmallChain, snapshots: list[SnapshotRecord | None], due: bool
) -> None:
    as_if(chain, snapshots)
    assert planned(chain).audit_due is due
