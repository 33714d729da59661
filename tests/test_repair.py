"""`blockdiff repair`: what can be derived is rebuilt, what is broken is set aside, and nothing sound is lost."""

import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiff.backup import Options
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.durable import Directory
from blockdiff.chain.generations import Chain
from blockdiff.check import repair
from blockdiff.format import digesttable
from blockdiff.shared.errors import BlockdiffError, BusyError, StorageError
from tests import chains, commands, faults
from tests.chains import BLOCK, DAYS, SmallChain

ORIGINAL = Options(block_size=BLOCK, delta_format=1, digest="md5")
FULL = Options(block_size=BLOCK, full=True)


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


@pytest.fixture
def original(tmp_path: Path) -> SmallChain:
    """A chain as the original leaves it: format 1, MD5, no manifests."""
    return chains.without_manifests(chains.three_days(tmp_path, ORIGINAL))


def repaired(chain: SmallChain) -> repair.Plan:
    """Repair a chain as a dry run said, and see that nothing is left to do."""
    before = chain.files()
    with Chain(chain.name) as opened, repair.planned(opened) as expected:
        pass
    assert chain.files() == before
    told: list[str] = []
    found = repair.repair(chain.name, told=told.append)
    assert [deed.text for deed in found.deeds] == [deed.text for deed in expected.deeds]
    assert told[-len(found.deeds) :] == [deed.text for deed in found.deeds] or not found.deeds
    after = chain.files()
    assert repair.repair(chain.name).deeds == []
    assert chain.files() == after
    return found


def flip(path: Path, place: int) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def present(chain: SmallChain) -> list[int]:
    with Chain(chain.name) as opened:
        return list(opened.generations)


def assert_exact(chain: SmallChain) -> None:
    """What is there verifies, restores, and has a manifest; the next run goes on."""
    for number in present(chain):
        assert chain.verdict(number) is None
        assert chain.restored(number) == chain.images[number]
        assert chain.file(f".{number}.json").exists()
    last = chain.last()
    chain.add(DAYS[0])
    assert chain.restored(last + 1) == DAYS[0]


def test_nothing_is_done_to_a_sound_chain(chain: SmallChain) -> None:
    before = chain.files()
    assert repaired(chain) == repair.Plan()
    assert chain.files() == before


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"1\n"])
def test_the_version_file_is_rebuilt(chain: SmallChain, content: bytes | None) -> None:
    chain.file(".ver").unlink()
    if content is not None:
        chain.file(".ver").write_bytes(content)
    found = repaired(chain)
    assert [deed.text for deed in found.deeds] == [f"{chain.file('.ver')} says that 3 is the last generation"]
    assert chain.file(".ver").read_bytes() == b"3\n" and found.lost == {}
    assert_exact(chain)


def test_a_last_generation_without_manifest_is_not_lost_with_the_version_file(chain: SmallChain) -> None:
    chain.file(".ver").write_bytes(b"\xb0\x14")
    chain.file(".3.json").write_bytes(b"garbage")
    assert repaired(chain).lost == {}
    assert chain.file(".ver").read_bytes() == b"3\n"
    assert_exact(chain)


def test_a_manifest_behind_one_of_a_generation_that_is_lost_is_rebuilt_once(tmp_path: Path) -> None:
    """Found by the model: it got another chain each time, and so was never the child of the one that is left."""
    chain = chains.some_days(tmp_path, 1)
    chain.add(DAYS[1], FULL)
    chain.file(".2.json").unlink()
    chain.file(".1.gz").unlink()
    found = repaired(chain)
    assert [deed.text for deed in found.deeds] == [f"{chain.file('.2.json')} rebuilt"]
    assert found.lost == {1: f"{chain.file('.1.gz')} is missing"}
    assert chain.restored(2) == DAYS[1]


def test_a_manifest_of_another_chain_with_a_generation_that_is_lost_is_set_aside(tmp_path: Path) -> None:
    chain = chains.some_days(tmp_path, 1)
    chain.add(DAYS[1], FULL)
    chain.add(DAYS[2])
    (tmp_path / "elsewhere").mkdir()
    other = chains.some_days(tmp_path / "elsewhere", 1)
    shutil.copy(other.file(".1.json"), chain.file(".1.json"))
    chain.file(".1.gz").unlink()
    found = repaired(chain)
    assert [deed.text for deed in found.deeds] == [
        f"{chain.file('.1.json')} set aside: it is of another chain",
        f"{chain.file('.2.json')} rebuilt",
        f"{chain.file('.3.json')} has another parent",
    ]
    assert list(found.lost) == [1]
    assert (chain.restored(2), chain.restored(3)) == (DAYS[1], DAYS[2])


def test_a_version_file_that_is_ahead_is_put_back(chain: SmallChain) -> None:
    chain.file(".ver").write_bytes(b"5\n")
    found = repaired(chain)
    assert found.lost == {4: "none of the files of generations 4 to 5 is there"}
    assert chain.file(".ver").read_bytes() == b"3\n"
    assert_exact(chain)


@pytest.mark.parametrize("has_version", [True, False])
def test_a_chain_of_the_original_gets_manifests(original: SmallChain, has_version: bool) -> None:
    if not has_version:
        original.file(".ver").unlink()
    found = repaired(original)
    assert len(found.deeds) == (3 if has_version else 4) and found.lost == {}
    assert original.file(".ver").read_bytes() == b"3\n"
    with Chain(original.name) as opened:
        made = [generation.manifest for generation in opened.generations.values()]
    assert [known and known.image_size for known in made] == [len(image) for image in DAYS]
    assert [known and known.full for known in made] == [True, False, False]
    assert len({known.chain for known in made if known is not None}) == 1
    assert_exact(original)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("deed", ["missing", "flipped"])
def test_a_manifest_is_rebuilt_and_the_next_ones_follow_it(chain: SmallChain, number: int, deed: str) -> None:
    path = chain.file(f".{number}.json")
    content = path.read_bytes()
    path.unlink()
    if deed == "flipped":
        path.write_bytes(content.replace(b'"full"', b'"fulL"'))
    found = repaired(chain)
    assert [deed.text for deed in found.deeds] == [
        f"{path} rebuilt",
        *(f"{chain.file(f'.{later}.json')} has another parent" for later in range(number + 1, 4)),
    ]
    assert found.lost == {}
    with Chain(chain.name) as opened:
        manifest = opened.generations[number].manifest
    assert manifest is not None and manifest.source.path == str(chain.source)
    assert any("rebuilt" in note for note in manifest.notes)
    assert_exact(chain)


def test_a_manifest_whose_delta_has_another_checksum_but_the_same_blocks_is_rebuilt(chain: SmallChain) -> None:
    flip(chain.file(".2.gz"), 4)  # the time in the header of a gzip member
    assert chain.bad() == [2]
    assert repaired(chain).lost == {}
    assert chain.bad() == []
    assert_exact(chain)


def test_a_last_generation_that_is_broken_is_set_aside(chain: SmallChain) -> None:
    path = chain.file(".3.gz")
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    found = repaired(chain)
    assert list(found.lost) == [3] and present(chain) == [1, 2]
    assert chain.file(".ver").read_bytes() == b"2\n"
    assert chain.file(".3.gz.aside-1").read_bytes() == content[:-1]
    assert_exact(chain)


@pytest.mark.parametrize("numbers", [(1,), (2,), (3,), (1, 2, 3)])
@pytest.mark.parametrize("deed", ["missing", "flipped", "cut"])
def test_a_digest_table_is_rebuilt_from_the_deltas(chain: SmallChain, numbers: tuple[int, ...], deed: str) -> None:
    paths = [chain.file(f".{number}.sha256") for number in numbers]
    before = chain.files()
    for path in paths:
        if deed == "missing":
            path.unlink()
        elif deed == "flipped":
            flip(path, 7)
        else:
            path.write_bytes(path.read_bytes()[:-1])
    found = repaired(chain)
    assert [deed.text for deed in found.deeds] == [f"{path} rebuilt from the deltas" for path in paths]
    assert found.lost == {} and chain.files().items() >= before.items()
    assert all(chain.file(f".{number}.sha256.aside-1").exists() == (deed != "missing") for number in numbers)
    assert_exact(chain)


def test_a_large_sparse_digest_table_is_rebuilt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digesttable, "PLAIN_LIMIT", 100)
    chain = chains.three_days(tmp_path)
    before = chain.file(".3.sha256").read_bytes()
    assert before.startswith(b"\0\0\0\0BDt2")
    chain.file(".3.sha256").unlink()
    assert repaired(chain).lost == {}
    assert chain.file(".3.sha256").read_bytes() == before
    assert_exact(chain)


@pytest.mark.parametrize("suffix", [".2.gz", ".1.gz"])
def test_a_digest_table_is_not_rebuilt_from_deltas_that_are_damaged_too(chain: SmallChain, suffix: str) -> None:
    chain.file(".2.sha256").unlink()
    path = chain.file(suffix)
    flip(path, path.stat().st_size // 2)
    assert 2 in repaired(chain).lost
    assert not chain.file(".2.sha256").exists()


def test_what_is_broken_before_the_last_sound_generation_stays_and_is_told(chain: SmallChain) -> None:
    chain.add(DAYS[0], FULL)
    chain.add(DAYS[1])
    chain.file(".2.gz").unlink()
    before = chain.files()
    found = repaired(chain)
    assert sorted(found.lost) == [2, 3] and found.deeds == []
    assert chain.files() == before
    chain.add(DAYS[2])
    assert chain.restored() == DAYS[2]


def test_a_delta_that_younger_generations_need_stays_though_its_own_table_is_gone(chain: SmallChain) -> None:
    chain.file(".1.sha256").unlink()
    flip(chain.file(".1.gz"), 4)  # the time in the header of a gzip member: no longer the delta that the manifest knows
    found = repaired(chain)
    assert list(found.lost) == [1] and found.deeds == []
    assert chain.restored(3) == DAYS[2]


def test_a_generation_is_sound_by_its_files_where_a_table_before_it_is_rebuilt(chain: SmallChain) -> None:
    chain.file(".1.sha256").unlink()
    chain.file(".2.json").unlink()
    found = repaired(chain)
    assert found.lost == {} and len(found.deeds) == 3
    assert_exact(chain)


def test_a_full_generation_of_another_chain_is_not_taken_in(chain: SmallChain, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = chains.three_days(tmp_path / "other", FULL)
    for path in other.directory.glob("disk.3.*"):
        (chain.directory / path.name).write_bytes(path.read_bytes())
    found = repaired(chain)
    assert list(found.lost) == [3] and present(chain) == [1, 2]
    assert_exact(chain)


def test_a_generation_of_which_only_the_manifest_is_left_is_set_aside(chain: SmallChain) -> None:
    for suffix in (".3.gz", ".3.sha256"):
        chain.file(suffix).unlink()
    found = repaired(chain)
    assert set(found.lost) == {3}
    assert present(chain) == [1, 2]
    assert chain.file(".3.json.aside-1").exists()


def test_what_a_crash_left_is_set_aside(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[0])
    repair.repair(chain.name)
    assert repair.repair(chain.name).deeds == []
    assert present(chain) == [1, 2, 3] and chain.temporary() == []
    assert_exact(chain)


def test_a_chain_without_anything_sound_is_not_touched(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    chain.add(DAYS[0])
    chain.file(".1.gz").write_bytes(b"short")
    before = chain.files()
    found = repaired(chain)
    assert list(found.lost) == [1] and chain.files() == before


def test_what_cannot_be_read_is_not_taken_for_broken(chain: SmallChain, monkeypatch: pytest.MonkeyPatch) -> None:
    before = chain.files()
    really = Directory.open

    def fails(self: Directory, name: str) -> int:
        if name == "disk.2.gz":
            raise StorageError("cannot open disk.2.gz: Input/output error")
        return really(self, name)

    monkeypatch.setattr(Directory, "open", fails)
    with pytest.raises(StorageError, match="Input/output error"):
        repair.repair(chain.name)
    monkeypatch.undo()
    assert chain.files() == before


def test_a_chain_that_is_busy_is_left_alone(chain: SmallChain) -> None:
    chain.file(".ver").unlink()
    with LockedChain(chain.name, recovers=False), pytest.raises(BusyError):
        repair.repair(chain.name)
    assert not chain.file(".ver").exists()


def test_what_a_rebuilt_table_proves_is_put_in_order_at_once(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)
    chain.file(".1.json").unlink()
    table = bytearray(chain.file(".2.sha256").read_bytes())
    table[50] ^= 1
    chain.file(".2.sha256").write_bytes(table)
    found = repaired(chain)
    assert found.lost == {}
    assert [deed.text.rsplit("/", 1)[1] for deed in found.deeds][:2] == [
        "disk.2.sha256 rebuilt from the deltas",
        "disk.1.json rebuilt",
    ]
    assert repair.repair(chain.name).deeds == []
    chain.assert_restores()


@given(seed=st.integers(0, 2**32), is_original=st.booleans())
@settings(max_examples=40)
def test_whatever_is_damaged_what_is_left_is_exact_and_nothing_sound_is_lost(
    tmp_path_factory: pytest.TempPathFactory, seed: int, is_original: bool
) -> None:
    place = tmp_path_factory.mktemp("repair")
    chain = chains.three_days(place, ORIGINAL if is_original else None)
    chain.add(DAYS[1], Options(block_size=BLOCK, full=True))
    chain.add(DAYS[2])
    if is_original:
        chains.without_manifests(chain)
    chooser = random.Random(seed)
    for path in chooser.sample(sorted(chain.directory.glob("disk.*")), 2):
        chains.harm(path, chooser)
    restorable = {number for number in present(chain) if _restores(chain, number)}
    found = repair.repair(chain.name)
    after = chain.files()
    assert repair.repair(chain.name).deeds == []
    assert chain.files() == after
    assert restorable <= {number for number in present(chain) if _restores(chain, number)}
    for number in set(present(chain)) - set(found.lost):
        assert chain.restored(number) == chain.images[number]
        assert chain.verdict(number) is None


def _restores(chain: SmallChain, number: int) -> bool:
    try:
        return chain.restored(number) == chain.images[number]
    except BlockdiffError:
        return False


def test_the_command_says_what_it_does(chain: SmallChain) -> None:
    assert commands.done("blockdiff", "repair", chain.name) == b""
    chain.file(".ver").unlink()
    line = f"{chain.file('.ver')} says that 3 is the last generation\n"
    assert commands.done("blockdiff", "repair", "--dry-run", chain.name).decode() == f"would be done: {line}"
    assert not chain.file(".ver").exists()
    assert commands.done("blockdiff", "repair", chain.name).decode() == line
    chain.file(".3.gz").write_bytes(b"short")
    result = commands.run("blockdiff", "repair", chain.name)
    assert result.returncode == 5 and b"generation 3 is lost: " in result.stderr
    assert commands.done("blockdiff", "repair", chain.name) == b""
    result = commands.run("blockdiff", "repair", f"{chain.name}-none")
    assert result.returncode == 1 and b"there is no chain" in result.stderr


def test_first_generations_that_are_gone_are_lost_and_the_command_says_what_to_do(chain: SmallChain) -> None:
    for path in chain.directory.glob("disk.1.*"):  # as by find -mtime +30 -delete
        path.unlink()
    before = chain.files()
    result = commands.run("blockdiff", "repair", chain.name)
    assert result.returncode == 5 and chain.files() == before
    said = result.stderr.decode()
    assert "generation 1 is lost: none of its files is there" in said and "generation 3 is lost: " in said
    assert "Put the missing files back from a copy and run repair again." in said and "`backup --full`" in said
    assert commands.run("blockdiff", "verify", chain.name).returncode == 5
    chain.add(DAYS[0], FULL)
    chain.add(DAYS[1])
    result = commands.run("blockdiff", "repair", chain.name)
    assert result.returncode == 5
    assert "generation 4 is full and needs nothing before it; move the files of generations 2 to 3 away" in (
        result.stderr.decode()
    )
    for path in chain.directory.glob("disk.[23].*"):
        path.unlink()
    assert commands.done("blockdiff", "repair", chain.name) == b""
    assert commands.done("blockdiff", "verify", chain.name) == b""


def test_an_oldest_generation_that_turns_out_to_be_full_lacks_nothing(tmp_path: Path) -> None:
    chain = chains.some_days(tmp_path, 1, ORIGINAL)
    chain.add(DAYS[1], Options(block_size=BLOCK, delta_format=1, digest="md5", full=True))
    chain.add(DAYS[2])
    chains.without_manifests(chain)
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    found = repaired(chain)
    assert found.lost == {} and found.advice is None and len(found.deeds) == 2
    assert_exact(chain)
