"""Runs on thin volumes: what they keep, what they read, and when they trust what thin_delta says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from blockdiff import merge
from blockdiff.chain.generations import Chain
from tests import commands
from tests.lab.backups import PATIENCE_S, VolumeChain, device_digest, part, wait_until
from tests.lab.volumes import VolumeGroup

pytestmark = pytest.mark.timeout(900)  # less than a minute for each on a machine that has nothing else to do

MIB = 1 << 20
#: Bytes of a block, of the pool and of the chains alike.
BLOCK = 64 << 10
KEEP = "--keep-snapshot"
_SCAN = "everything is read: "
_NOT_THERE = f"{_SCAN}the snapshot that the last run kept is not there"
#: Comes before the real one on the agent's PATH.
_WRAPPER = "/usr/local/bin/thin_delta"
_LIE = '#!/bin/sh\n/usr/sbin/thin_delta "$@" | sed "s/<different /<same /; s/<right_only /<same /"\n'

# files of one directory are made, written over in part, and removed: by chance, but the same for the same seed
_CHANGE = """
import os, random, sys
place, seed = sys.argv[1:]
chance = random.Random(seed)
for _ in range(chance.randrange(4, 12)):
    path = os.path.join(place, str(chance.randrange(10)))
    there = os.path.exists(path)
    if there and chance.random() < 0.4:
        os.unlink(path)
        continue
    with open(path, "r+b" if there else "wb") as file:
        file.seek(chance.randrange(0, 1500000))
        length = chance.randrange(1, 400000)
        file.write(chance.randbytes(length) if chance.random() < 0.8 else bytes(length))
"""

# one is like ours by its name, one by all but its origin; neither is
_FOREIGN = """
lvcreate -q -y -s -kn -ay -pr -n bd_x {vg}/data &&
lvcreate -q -y -s -kn -ay -pr -n bd_0123456789abcdef --addtag blockdiff --addtag blockdiff_kept {tag} {vg}/other
"""


class Thin:
    """The thin volume ``data`` of `size`, in a pool that has others as well, and a chain for it.

    A context manager: in the end nothing is reserved, and the snapshots that are not ours are as they were.
    """

    def __init__(self, group: VolumeGroup, directory: Path, size: str = "32M", pool: str = "256M") -> None:
        self.group = group
        self.guest = group.guest
        group.pool("pool", pool)
        self.path = group.thin("data", size, "pool")
        group.thin("other", "8M", "pool")
        (directory / "backup").mkdir()
        self.chain = self.another("data", directory)
        tag = "--addtag blockdiff_pid_1_1_0123456789ab"
        self.guest.run(_FOREIGN.format(vg=group.name, tag=tag))

    def __enter__(self) -> "Thin":
        self._foreign = self._show_foreign()
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._show_foreign() == self._foreign
        assert self.held() == "-"

    def _show_foreign(self) -> str:
        command = "lvs --noheadings -o lv_uuid,lv_tags,lv_attr,thin_id {vg}/bd_x {vg}/bd_0123456789abcdef"
        return self.guest.output(command.format(vg=self.group.name))

    def another(self, name: str, directory: Path) -> VolumeChain:
        """Return one more chain of the volume."""
        return VolumeChain(self.guest, directory / "backup" / name, self.path)

    def write(self, offset: int, count: int = 1, block: int = BLOCK) -> None:
        """Write `count` blocks of random bytes at `offset`, a multiple of `block`."""
        words = f"bs={block} seek={offset // block} count={count} oflag=direct conv=notrunc status=none"
        self.guest.run(f"dd if=/dev/urandom of={self.path} {words}")

    def digest(self) -> str:
        """Return the SHA-256 of the volume as it is."""
        return device_digest(self.guest, self.path)

    def ours(self) -> set[str]:
        """Return the names of the snapshots of the volume that runs have made."""
        names = self.guest.output(f"lvs --noheadings -o lv_name -S origin=data {self.group.name}").split()
        return {name for name in names if name.startswith("bd_")} - {"bd_x"}

    def kept(self) -> str:
        """Return the name of the one snapshot that runs have left, which is kept."""
        (name,) = self.ours()
        tags = self.guest.output(f"lvs --noheadings -o lv_tags {self.group.name}/{name}").strip().split(",")
        assert "blockdiff_kept" in tags and not any(tag.startswith("blockdiff_pid_") for tag in tags)
        return name

    def held(self) -> str:
        """Return the root of the metadata snapshot that is held; ``-`` for none."""
        return self.guest.output(f"dmsetup status {self.group.name}-pool-tpool").split()[6]

    def message(self, words: str) -> None:
        """Send the pool a message."""
        self.guest.run(f"dmsetup message {self.group.name}-pool-tpool 0 {words}")

    def pool_reads(self) -> int:
        """Return how many bytes of the pool's data have been read so far, as the kernel counts."""
        number = self.guest.output(f"basename $(readlink -f /dev/mapper/{self.group.name}-pool_tdata)")
        return 512 * int(self.guest.output(f"cat /sys/block/{number}/stat").split()[2])

    @contextmanager
    def lies(self) -> Iterator[None]:
        """Let thin_delta say that nothing changed."""
        self.guest.put(_WRAPPER, _LIE.encode())
        self.guest.run(f"chmod 755 {_WRAPPER}")
        try:
            yield
        finally:
            self.guest.run(f"rm -f {_WRAPPER}")


@pytest.fixture
def thin(volume_group: VolumeGroup, tmp_path: Path) -> Iterator[Thin]:
    """A volume of 32 MiB, 16 of which are written."""
    with Thin(volume_group, tmp_path) as thin:
        thin.write(0, 256)
        yield thin


def extents(told: dict[str, object]) -> object:
    """Return how the extents were known that a run read."""
    return part(told, "snapshot")["extents"]


def number(told: dict[str, object], name: str) -> int:
    """Return a number of a summary."""
    value = told[name]
    assert isinstance(value, int)
    return value


def delta(chain: VolumeChain, generation: int) -> dict[int, bytes]:
    """Return the blocks that a generation's delta carries, by their offsets."""
    blocks = {}
    with Chain(str(chain.name)) as found:
        wanted = found.generation(generation)
        with merge.open_delta(wanted) as file, merge.read_delta(wanted, file) as reader:
            for run in reader.runs():
                data = bytes(run.length) if run.data is None else bytes(run.data)
                blocks.update({run.offset + at: data[at : at + BLOCK] for at in range(0, run.length, BLOCK)})
    return blocks


def test_a_thin_snapshot_is_read_only_and_stays_only_as_long_as_it_is_asked_for(thin: Thin) -> None:
    assert extents(thin.chain.backup(KEEP)) == "mapped"
    thin.kept()
    told = thin.chain.backup()
    assert (extents(told), told["bytes_read"], told["notes"]) == (None, 32 * MIB, [])
    assert thin.ours() == set()

    with thin.chain.slowly(MIB, "--full", KEEP) as (_hold, end):
        (name,) = thin.ours()
        shown = thin.guest.output(f"lvs --noheadings -o segtype,pool_lv,origin,lv_attr {thin.group.name}/{name}")
        segtype, pool, origin, attributes = shown.split()
        assert (segtype, pool, origin) == ("thin", "pool", "data")
        assert (attributes[1], attributes[4]) == ("r", "a")
        refused = thin.guest.run(f"echo x | dd of={thin.group.path(name)} conv=notrunc", check=False)
        assert refused.returncode != 0 and "Operation not permitted" in refused.stderr
        status, out, err = end()
    assert (status, err) == (0, "")
    snapshot = part(json.loads(out), "snapshot")
    assert (snapshot["kind"], snapshot["kept"], snapshot["fill_percent"]) == ("thin", True, None)
    assert thin.kept() == name


def table(chain: VolumeChain, generation: int) -> bytes:
    """Return the digest table of a generation."""
    return chain.files()[f"{chain.name.name}.{generation}.sha256"]


def test_hinted_runs_equal_full_scans_and_the_tenth_is_audited(volume_group: VolumeGroup, tmp_path: Path) -> None:
    with Thin(volume_group, tmp_path, "24M") as thin:
        scanned = thin.another("scanned", tmp_path)
        place = volume_group.mounted(thin.path)
        thin.guest.put("/run/change.py", _CHANGE.encode())
        for generation in range(1, 12):
            if generation <= 5 or generation == 11:
                fstrim = f"fstrim {place};" if generation % 2 else ""
                change = f"python3 /run/change.py {place} {generation}; sync; {fstrim}"
                thin.guest.run(f"mountpoint -q {place} || mount {thin.path} {place}; {change} umount {place}")
            told = thin.chain.backup(KEEP)
            assert told["notes"] == []
            assert extents(told) == {1: "mapped", 11: "audited"}.get(generation, "changed")
            assert (number(told, "bytes_read") < 24 * MIB) == (generation < 11)
            if generation <= 5 or generation == 11:
                assert thin.chain.digest(generation) == thin.digest()
            if 3 <= generation <= 5:  # with fstrim and without
                known = extents(scanned.backup())
                assert known == ("mapped" if generation == 3 else None)
                assert table(scanned, generation - 2) == table(thin.chain, generation)
                assert known == "mapped" or delta(scanned, generation - 2) == delta(thin.chain, generation)
        thin.kept()
        thin.chain.verify()


def test_whatever_does_not_fit_means_that_everything_is_read_and_why(thin: Thin) -> None:
    thin.chain.backup(KEEP)
    generation, name = 1, thin.group.name

    def falls_back(why: str) -> None:
        nonlocal generation
        generation += 1
        thin.write(generation * MIB)
        told = thin.chain.backup(KEEP)
        notes = told["notes"]
        assert isinstance(notes, list)
        assert notes[-1].startswith(why), notes
        assert (extents(told), told["bytes_read"]) == (None, told["image_size"])
        assert thin.chain.digest(generation) == thin.digest()
        assert notes == json.loads(thin.chain.files()[f"data.{generation}.json"])["notes"]

    # its thin id is used again by what took its place: a hint from that would be of another moment
    old = thin.kept()
    thin_id = f"lvs --noheadings -o thin_id {name}/{old}"
    before = thin.guest.output(thin_id)
    thin.write(20 * MIB)
    thin.guest.run(f"lvremove -q -y {name}/{old} && lvcreate -q -y -s -kn -ay -pr -n {old} {thin.path}")
    assert thin.guest.output(thin_id) == before
    falls_back(_NOT_THERE)
    assert old in thin.ours() and len(thin.ours()) == 2
    thin.guest.run(f"lvremove -q -y {name}/{old}")

    program = thin.guest.output("command -v thin_delta")
    thin.guest.run(f"mv {program} {program}.away")
    try:
        falls_back(f"{_SCAN}thin_delta is not installed there")
    finally:
        thin.guest.run(f"mv {program}.away {program}")
    thin.kept()

    thin.message("reserve_metadata_snap")
    held = thin.held()
    falls_back(f"{_SCAN}the metadata snapshot of {name}-pool-tpool is in use")
    assert thin.held() == held != "-"
    thin.message("release_metadata_snap")
    thin.kept()

    thin.guest.run(f"lvextend -q -L +4M {thin.path}")
    falls_back(f"{_SCAN}the volume was resized from {32 * MIB} to {36 * MIB} bytes")
    thin.kept()

    thin.write(30 * MIB)
    told = thin.chain.backup(KEEP)
    assert (extents(told), told["notes"], told["changed_blocks"]) == ("changed", [], 1)
    assert thin.chain.digest(generation + 1) == thin.digest()
    thin.chain.verify()


def test_a_kept_snapshot_that_can_be_written_to_is_not_trusted(thin: Thin) -> None:
    thin.chain.backup(KEEP)
    old = thin.kept()
    thin.guest.run(f"lvchange -q -prw {thin.group.name}/{old}")
    thin.write(MIB)
    told = thin.chain.backup(KEEP)
    assert (extents(told), told["notes"]) == (None, [_NOT_THERE])
    assert thin.chain.digest(2) == thin.digest()
    thin.chain.backup(KEEP)
    assert thin.kept() != old


def test_an_audit_finds_what_thin_delta_did_not_report(thin: Thin) -> None:
    thin.chain.backup(KEEP)
    thin.write(3 * MIB)
    with thin.lies():
        told = thin.chain.backup(KEEP)
    assert (extents(told), told["changed_blocks"]) == ("changed", 0)  # believed, for lack of an audit
    kept = thin.kept()

    said = thin.chain.fails(KEEP, "--audit")
    assert f"the audit failed: thin_delta did not report the change at offset {3 * MIB}" in said
    assert "use --full now" in said
    assert thin.kept() == kept

    assert extents(thin.chain.backup(KEEP, "--full")) == "mapped"
    thin.write(5 * MIB)
    assert extents(thin.chain.backup(KEEP, "--audit")) == "audited"
    assert thin.chain.digest(4) == thin.digest()
    thin.kept()


def test_reading_costs_what_is_mapped_and_then_what_has_changed(volume_group: VolumeGroup, tmp_path: Path) -> None:
    with Thin(volume_group, tmp_path, "512M") as thin:
        thin.write(100 * MIB, 48 * 16)

        def cost() -> tuple[int, int]:
            before = thin.pool_reads()
            told = thin.chain.backup(KEEP)
            return number(told, "bytes_read"), thin.pool_reads() - before

        read, read_by_kernel = cost()
        assert 48 * MIB <= read <= 49 * MIB
        assert 48 * MIB <= read_by_kernel <= 50 * MIB
        written = 0
        for offset in range(101 * MIB, 145 * MIB, 4 * MIB):
            thin.write(offset, 8)
            written += 8 * BLOCK
        read, read_by_kernel = cost()
        assert written <= read <= 1.5 * written
        assert written <= read_by_kernel <= 1.5 * written + 2 * MIB
        assert thin.chain.digest(2) == thin.digest()


@pytest.mark.parametrize("generation", [1, 2])
def test_a_run_whose_commit_fails_leaves_no_second_kept_snapshot_for_good(thin: Thin, generation: int) -> None:
    if generation == 2:
        thin.chain.backup(KEEP)
    thin.write(MIB)
    hold, begun = "/run/lab-hold", "/run/lab-begun"
    thin.guest.run(f"rm -f {begun}; touch {hold}")
    wait = f"touch {begun}; while [ -e {hold} ]; do sleep 0.05; done"
    with commands.started(*thin.chain.words(KEEP, "--before", wait)) as process:
        wait_until(lambda: thin.guest.run(f"test -e {begun}", check=False).returncode == 0)
        in_the_way = thin.chain.name.with_name(f"data.{generation}.gz")
        in_the_way.touch()
        thin.guest.run(f"rm {hold}")
        said = process.communicate(timeout=PATIENCE_S)[1].decode()
    assert process.returncode == 1
    assert in_the_way.name in said
    uncommitted = thin.kept()
    in_the_way.unlink()

    told = thin.chain.backup(KEEP)
    assert told["generation"] == generation
    removed = f"removed the snapshot {thin.group.name}/{uncommitted}, which an earlier run left"
    assert told["notes"] == [removed, _NOT_THERE][:generation]  # the first one reads what is mapped, as ever
    assert thin.kept() != uncommitted
    assert thin.chain.digest(generation) == thin.digest()


def test_the_chain_of_a_new_day_takes_over_what_that_of_the_day_before_kept(thin: Thin) -> None:
    told, kept = [], []
    for zone in ("EARLY+12", "LATE-14"):  # never the same day there
        words = thin.chain.words(KEEP, "--chain", "daily")
        told.append(json.loads(commands.done(*words, env={"TZ": zone})))
        kept.append(thin.kept())
    assert told[0]["name"] != told[1]["name"]
    assert [each["generation"] for each in told] == [1, 1]
    assert told[1]["notes"] == [f"removed the snapshot {thin.group.name}/{kept[0]}, which an earlier run left"]


def test_a_pool_that_is_too_full_is_refused_before_anything_is_made(volume_group: VolumeGroup, tmp_path: Path) -> None:
    with Thin(volume_group, tmp_path, "40M", pool="32M") as thin:
        thin.write(0, 31 * 16)
        said = thin.chain.fails()
        name = volume_group.name
        assert f"the data of the thin pool {name}/pool of {name}/data is 96.88% full" in said
        assert "a snapshot could stop all its volumes" in said and "lvextend" in said
        assert thin.ours() == set()


def snapshots(thin: Thin, *words: str) -> dict[str, tuple[object, object]]:
    """Return the volume of each snapshot of ours that a host has, and whether nobody needs it."""
    out = commands.done("blockdiff", "snapshots", thin.guest.url("/"), "--json", *thin.guest.arguments, *words)
    return {each["name"]: (each["volume"], each["useless"]) for each in json.loads(out)["snapshots"]}


def test_a_kept_snapshot_that_nobody_needs_is_told_and_removed_by_name(thin: Thin) -> None:
    """First its chain goes, then its volume: LVM forgets of what it is a snapshot."""
    group, guest = thin.group.name, thin.guest
    other = f"{group}/bd_0123456789abcdef"  # kept, as its tags say, by somebody else
    thin.chain.backup(KEEP)
    kept = f"{group}/{thin.kept()}"
    assert snapshots(thin) == {kept: (f"{group}/data", False), other: (f"{group}/other", False)}

    for path in thin.chain.name.parent.glob("data.*"):
        path.unlink()
    assert snapshots(thin)[kept] == (f"{group}/data", True)
    beside = VolumeChain(guest, thin.chain.name.parent / "beside", thin.group.thin("beside", "8M", "pool"))
    why = f"note: the snapshot {kept} is still on the host, although its chain no longer exists: `blockdiff snapshots ssh://"
    assert why in commands.run(*beside.words()).stderr.decode()

    guest.run(f"lvremove -q -y {thin.path}")
    assert snapshots(thin)[kept] == (None, True)
    refused = commands.run(
        *("blockdiff", "snapshots", guest.url("/"), *guest.arguments), *("--remove", f"{group}/bd_x", "--remove", kept)
    )
    assert refused.returncode == 1 and f"{group}/bd_x is not a snapshot that blockdiff made".encode() in refused.stderr
    assert kept in snapshots(thin)
    assert snapshots(thin, "--remove", kept) == {other: (f"{group}/other", False)}
    assert kept.partition("/")[2] not in thin.group.volumes()
