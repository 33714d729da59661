"""Backup data that is missing or not what was written: what verify, restore and the next backup make of it."""

import random
import shutil
import subprocess
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff import merge
from blockdiff.backup import Options
from blockdiff.chain.generations import Chain
from blockdiff.check import verify
from blockdiff.shared.errors import BlockdiffError, DamagedError
from tests import chains, commands
from tests.chains import BLOCK, DAYS, MemoryTarget, SmallChain

FULL = Options(block_size=BLOCK, full=True)


class Templates:
    """Chains of three days: made once, copied for each case."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def copy(
        self, directory: Path, delta_format: int = 2, compression: str = "gzip", digest: str = "sha256"
    ) -> SmallChain:
        """Return a copy in a new directory below `directory`."""
        place = self._directory / f"{delta_format}{compression}{digest}"
        if not place.exists():
            place.mkdir()
            options = Options(block_size=BLOCK, delta_format=delta_format, compression=compression, digest=digest)
            chains.three_days(place, options)
        made = SmallChain(place / "backup", place / "source", images=dict(enumerate(DAYS, 1)))
        return made.copy_to(directory / "backup")


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Templates:
    return Templates(tmp_path_factory.mktemp("templates"))


@pytest.fixture
def chain(templates: Templates, tmp_path: Path) -> SmallChain:
    return templates.copy(tmp_path)


@pytest.fixture
def original(templates: Templates, tmp_path: Path) -> SmallChain:
    """A chain as the original leaves it: format 1, MD5, no manifests."""
    return chains.without_manifests(templates.copy(tmp_path, 1, "gzip", "md5"))


# NAME.ver


@pytest.mark.parametrize(
    "content", [None, b"", b"garbage", b"0\n", b"-1\n", b"1", b"1\n", b"2\n", b"3 \n", b"\xff\xff"]
)
def test_a_version_file_that_is_missing_unfit_or_behind_is_rebuilt_from_the_manifests(
    chain: SmallChain, content: bytes | None
) -> None:
    chain.file(".ver").unlink()
    if content is not None:
        chain.file(".ver").write_bytes(content)
    before = chain.files()
    assert chain.last() == 3 and chain.restored() == DAYS[2]
    assert chain.files() == before  # reading changes nothing
    assert chain.add(DAYS[0]).manifest.generation == 4
    assert chain.file(".ver").read_bytes() == b"4\n"
    chain.assert_sound()


@pytest.mark.parametrize("content", [None, b"", b"garbage", b"0\n"])
def test_without_manifests_and_a_version_the_command_refuses_and_says_how_to_go_on(
    original: SmallChain, content: bytes | None
) -> None:
    original.file(".ver").unlink()
    if content is not None:
        original.file(".ver").write_bytes(content)
    before = original.files()
    result = commands.run("blockdiff", "backup", original.name, original.source)
    assert result.returncode == 5
    message = result.stderr.decode()
    assert original.file(".ver").name in message and "names the last generation" in message
    assert f"echo 3 > {original.file('.ver')}" in message
    assert original.files() == before
    original.file(".ver").write_bytes(b"3\n")  # what the hint says
    original.add(DAYS[0])
    original.assert_sound()


def test_the_hint_quotes_the_path_for_the_shell(templates: Templates, tmp_path: Path) -> None:
    (tmp_path / "it's $(here)").mkdir()
    chain = chains.without_manifests(templates.copy(tmp_path / "it's $(here)"))
    chain.file(".ver").unlink()
    with pytest.raises(DamagedError) as caught:
        chain.add(DAYS[0])
    assert caught.value.hint is not None
    command = caught.value.hint.partition(": ")[2]
    assert subprocess.run(["sh", "-c", command], check=True, timeout=60).returncode == 0
    assert chain.file(".ver").read_bytes() == b"3\n"


def test_a_version_file_without_generations_is_no_new_chain(chain: SmallChain) -> None:
    for path in chain.directory.glob("disk.[0-9]*"):
        path.unlink()
    for arguments in (["verify", chain.name], ["list", chain.name], ["restore", chain.name, chain.source.parent / "x"]):
        result = commands.run("blockdiff", *arguments)
        assert result.returncode == 5 and b"generation 3" in result.stderr, result
    with pytest.raises(DamagedError, match=r"disk\.ver says 3, but generation 3 is missing"):
        chain.add(DAYS[0])


@pytest.mark.parametrize("version", [4, 9, 999_999_999_999_999_999])
def test_a_version_ahead_of_the_files_is_refused(chain: SmallChain, version: int) -> None:
    chain.file(".ver").write_bytes(b"%d\n" % version)
    before = chain.files()
    with pytest.raises(DamagedError, match=f"says {version}, but generation {version} is missing"):
        chain.add(DAYS[0])
    assert chain.files() == before
    result = commands.run("blockdiff", "verify", chain.name)
    missing = "none of its files is" if version == 4 else f"none of the files of generations 4 to {version} is there"
    assert result.returncode == 5 and missing in result.stderr.decode(), result
    assert chain.bad() == [4] and chain.restored(3) == DAYS[2]


def test_a_version_behind_in_a_chain_of_the_original_moves_aside_and_loses_nothing(original: SmallChain) -> None:
    before = original.files()
    original.file(".ver").write_bytes(b"1\n")
    result = original.add(DAYS[1])
    assert result.manifest.generation == 2
    after = original.files()
    for name in ("disk.2.gz", "disk.2.md5", "disk.3.gz", "disk.3.md5"):
        assert after[f"{name}.aside-1"] == before[name]
    assert len(result.recovered) == 4
    original.assert_sound()


def test_every_flip_of_the_version_file_loses_no_generation(templates: Templates, tmp_path: Path) -> None:
    template = templates.copy(tmp_path)
    version = template.file(".ver").read_bytes()
    for bit in range(8 * len(version)):
        chain = template.copy_to(tmp_path / f"flipped{bit}")
        before = chain.files()
        chain.file(".ver").write_bytes(_flipped(version, bit))
        try:
            chain.add(DAYS[0])
        except DamagedError:
            assert {**chain.files(), "disk.ver": version} == before
        else:
            chain.assert_sound()
            assert chain.last() == 4
        shutil.rmtree(chain.directory)


# Digest tables


def _remove(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _cut_a_digest(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-32])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + bytes(32))


def _flip_in_the_middle(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(_flipped(content, 4 * len(content) + 3))


TABLE_DAMAGES = [_remove, _cut, _cut_a_digest, _empty, _lengthen, _flip_in_the_middle]


@pytest.mark.parametrize("damage", TABLE_DAMAGES)
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_table_is_named_and_hurts_its_own_generation_only(
    chain: SmallChain, number: int, damage: Callable[[Path], None]
) -> None:
    damage(chain.file(f".{number}.sha256"))
    verdicts = chain.verdicts()
    assert [n for n, error in verdicts.items() if error] == [number]
    error = verdicts[number]
    assert isinstance(error, DamagedError) and f"disk.{number}.sha256" in error.message
    for n, image in enumerate(DAYS, 1):
        if n != number:
            assert chain.restored(n) == image
    with pytest.raises(DamagedError, match=rf"disk\.{number}\.sha256"):
        chain.restored(number)


@pytest.mark.parametrize("damage", TABLE_DAMAGES)
def test_the_next_run_refuses_a_damaged_base_table_and_full_begins_anew(
    chain: SmallChain, damage: Callable[[Path], None]
) -> None:
    damage(chain.file(".3.sha256"))
    before = chain.files()
    with pytest.raises(DamagedError, match=r"disk\.3\.sha256"):
        chain.add(DAYS[0])
    assert chain.files() == before
    assert chain.add(DAYS[0], FULL).manifest.full
    chain.add(DAYS[1])
    assert chain.bad() == [3]
    assert (chain.restored(4), chain.restored(5)) == (DAYS[0], DAYS[1])


# Deltas

KINDS = [(f, c) for f in (1, 2) for c in ("gzip", "zstd", "none")]


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture
def no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do in turn what threads do ahead: to start them takes most of the time of thousands of tiny cases."""
    monkeypatch.setattr(
        "blockdiff.shared.pipeline.in_order", lambda work, items, workers=None, ahead=None: map(work, items)
    )


class Damaged:
    """One chain, opened once, whose files are damaged over and over."""

    def __init__(self, chain: SmallChain) -> None:
        self.small = chain
        self.chain = Chain(chain.name)

    def __enter__(self) -> "Damaged":
        return self

    def __exit__(self, *exception: object) -> None:
        self.chain.close()

    def verdict(self, number: int) -> BlockdiffError | None:
        with verify.Verifier(self.chain) as verifier:
            return verifier.one(number).error

    def restored(self, number: int) -> bytes | None:
        """Return the image, None where the restore fails as it should."""
        target = MemoryTarget()
        try:
            merge.merge(self.chain.needed(number), target)
        except DamagedError:
            return None
        return bytes(target.image)


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize(("delta_format", "compression"), KINDS)
@pytest.mark.parametrize("manifests", [True, False])
def test_a_delta_cut_at_any_byte_is_damaged_and_restores_nothing_wrong(
    templates: Templates, tmp_path: Path, delta_format: int, compression: str, manifests: bool
) -> None:
    small = templates.copy(tmp_path, delta_format, compression)
    if not manifests:
        chains.without_manifests(small)
    path = small.file(".2" + {"gzip": ".gz", "zstd": ".zst", "none": ""}[compression])
    content = path.read_bytes()
    with Damaged(small) as damaged:
        for length in range(len(content)):
            path.write_bytes(content[:length])
            error = damaged.verdict(2)
            assert isinstance(error, DamagedError) and "disk.2" in error.message, length
            assert damaged.restored(2) is None, length
            assert damaged.restored(3) in (None, DAYS[2]), length
        assert damaged.restored(1) == DAYS[0]


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize(("delta_format", "compression"), KINDS)
def test_a_delta_with_any_bit_flipped_is_damaged_and_restores_nothing_wrong(
    templates: Templates, tmp_path: Path, delta_format: int, compression: str
) -> None:
    small = templates.copy(tmp_path, delta_format, compression)
    path = small.file(".2" + {"gzip": ".gz", "zstd": ".zst", "none": ""}[compression])
    content = path.read_bytes()
    with Damaged(small) as damaged:
        for bit in range(8 * len(content)):
            path.write_bytes(_flipped(content, bit))
            error = damaged.verdict(2)
            assert isinstance(error, DamagedError) and "disk.2" in error.message, bit
            assert damaged.restored(2) in (None, DAYS[1]), bit  # some bits of a gzip header mean nothing
        assert damaged.restored(1) == DAYS[0]


@pytest.mark.usefixtures("no_threads")
@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_without_manifests_a_flipped_bit_restores_nothing_wrong_that_verify_calls_sound(
    templates: Templates, tmp_path: Path, compression: str
) -> None:
    small = chains.without_manifests(templates.copy(tmp_path, 1, compression, "md5"))
    path = small.file(".2" + {"gzip": ".gz", "none": ""}[compression])
    content = path.read_bytes()
    with Damaged(small) as damaged:
        for bit in range(8 * len(content)):
            path.write_bytes(_flipped(content, bit))
            restored = damaged.restored(2)
            assert restored in (None, DAYS[1]), bit
            assert (damaged.verdict(2) is None) == (restored is not None), bit


@pytest.mark.parametrize("delta_format", [1, 2])
def test_a_delta_that_goes_beyond_its_table_is_damaged(templates: Templates, tmp_path: Path, delta_format: int) -> None:
    """Without a manifest, a table that lost its last digests must not make an image shorter."""
    small = chains.without_manifests(templates.copy(tmp_path, delta_format, "gzip", "md5"))
    path = small.file(".2.md5")
    path.write_bytes(path.read_bytes()[:-16])
    assert isinstance(small.verdict(2), DamagedError)
    with pytest.raises(DamagedError, match=r"disk\.2\.md5"):
        small.restored(2)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
def test_damage_behind_the_part_of_a_delta_that_is_needed_does_not_matter(tmp_path: Path, compression: str) -> None:
    """Whether a restore reads that far must not depend on how far its threads were ahead."""
    chain = chains.new_chain(tmp_path)
    options = Options(block_size=1 << 20, compression=compression)
    first = random.Random(1).randbytes(8 << 20)
    chain.add(first, options)
    image = first[: 1 << 20] + b"x" * (7 << 20)
    chain.add(image, options)  # what is left of generation 1 is its first block
    path = chain.file(".1" + {"gzip": ".gz", "zstd": ".zst", "none": ""}[compression])
    path.write_bytes(path.read_bytes()[: (2 << 20) + (1 << 19)])
    for _ in range(5):
        assert chain.restored(2) == image
        assert chain.bad() == [1]


def test_an_offset_far_away_takes_no_memory(templates: Templates, tmp_path: Path) -> None:
    """One flipped bit of an offset must not make verify keep books on blocks that no image has."""
    small = templates.copy(tmp_path, 1, "none")
    path = small.file(".2")
    content = bytearray(path.read_bytes())
    place = len(content) - 10 - 8  # the head of the last record, whose block has 10 bytes
    assert int.from_bytes(content[place : place + 8], "little") == 6 * BLOCK
    content[place + 4] ^= 1 << 2  # 16 GiB further
    path.write_bytes(content)
    tracemalloc.start()
    try:
        assert small.bad() == [2]
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(DamagedError):
        small.restored(2)
    assert small.restored(3) == DAYS[2]


# Manifests


@pytest.mark.parametrize("number", [1, 2, 3])
def test_any_changed_byte_of_a_manifest_is_found(templates: Templates, tmp_path: Path, number: int) -> None:
    small = templates.copy(tmp_path)
    path = small.file(f".{number}.json")
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(_flipped(content, 8 * place + place % 7))
        with Chain(small.name) as chain:
            generation = chain.generations[number]
            assert generation.manifest is None and generation.manifest_error is not None, place
            assert f"disk.{number}.json" in generation.manifest_error.message
            assert chain.last() == 3
    assert isinstance(small.verdict(number), DamagedError)
    assert [small.restored(n) for n in (1, 2, 3)] == [*DAYS]


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"blockdiff_manifest": Infinity, "sha256": ""}'])
def test_what_is_no_manifest_is_refused(chain: SmallChain, content: bytes) -> None:
    chain.file(".3.json").write_bytes(content)
    error = chain.verdicts()[3]
    assert isinstance(error, DamagedError) and error.message.endswith("disk.3.json is not a manifest")
    before = chain.files()
    with pytest.raises(DamagedError, match=r"disk\.3\.json"):
        chain.add(DAYS[0])
    assert chain.files() == before
    chain.add(DAYS[0], FULL)
    assert chain.bad() == [3] and chain.restored(4) == DAYS[0]


def test_a_manifest_that_is_missing_is_damage(chain: SmallChain) -> None:
    """Only chains of the original do without."""
    for number in (2, 3):
        content = chain.file(f".{number}.json").read_bytes()
        chain.file(f".{number}.json").unlink()
        verdicts = chain.verdicts()
        error = verdicts.pop(number)
        assert error is not None and error.message.endswith(f"disk.{number}.json is missing")
        assert set(verdicts.values()) == {None}
        with pytest.raises(DamagedError, match=rf"disk\.{number}\.json is missing"):
            chain.add(DAYS[0])
        assert chain.restored(number) == DAYS[number - 1]
        chain.file(f".{number}.json").write_bytes(content)
    chain.assert_sound()


def test_in_format_1_the_next_generation_knows_that_there_was_a_manifest(templates: Templates, tmp_path: Path) -> None:
    chain = templates.copy(tmp_path, 1)
    chain.file(".2.json").unlink()
    error = chain.verdicts()[2]
    assert error is not None and error.message.endswith("disk.2.json is missing")
    assert chain.bad() == [2] and chain.restored(2) == DAYS[1]


def test_a_manifest_that_came_back_fits_a_full_generation_made_without_it(chain: SmallChain) -> None:
    content = chain.file(".3.json").read_bytes()
    chain.file(".3.json").write_bytes(b"{}")
    chain.add(DAYS[0], FULL)
    chain.file(".3.json").write_bytes(content)
    chain.assert_sound()


# Whole generations


def _files_of(chain: SmallChain, number: int) -> list[Path]:
    return sorted(chain.directory.glob(f"disk.{number}.*"))


def test_a_missing_generation_is_named_and_those_before_it_restore(chain: SmallChain) -> None:
    for path in _files_of(chain, 2):
        path.unlink()
    result = commands.run("blockdiff", "verify", chain.name)
    assert result.returncode == 5
    assert result.stderr.decode().splitlines()[:4] == [
        "blockdiff: generation 2: none of its files is there",
        "  restore them from a copy",
        "blockdiff: generation 3: it needs generation 2, which is missing",
        "  restore the damaged files from a copy",
    ]
    assert b"generation 1" not in result.stderr
    assert chain.restored(1) == DAYS[0]
    with pytest.raises(DamagedError, match="generation 2 is missing"):
        chain.restored(3)
    before = chain.files()
    with pytest.raises(DamagedError, match=r"generation 2 of .*disk is missing"):
        chain.add(DAYS[0])
    assert chain.files() == before


def test_full_begins_anew_inside_a_damaged_chain(chain: SmallChain) -> None:
    for path in _files_of(chain, 2):
        path.unlink()
    chain.source.write_bytes(DAYS[2])
    commands.done("blockdiff", "backup", "--full", chain.name, chain.source)
    chain.add(DAYS[0])
    assert chain.bad() == [2, 3]
    assert (chain.restored(4), chain.restored(5)) == (DAYS[2], DAYS[0])


def test_the_oldest_generations_may_be_removed_where_a_full_one_follows(chain: SmallChain) -> None:
    chain.add(DAYS[0], FULL)
    chain.add(DAYS[1])
    for number in (1, 2, 3):
        for path in _files_of(chain, number):
            path.unlink()
    assert chain.verdicts() == {4: None, 5: None}
    chain.add(DAYS[2])
    assert chain.verdicts() == {4: None, 5: None, 6: None}
    assert chain.restored(6) == DAYS[2]


def _another_chain(tmp_path: Path) -> SmallChain:
    (tmp_path / "other").mkdir()
    other = chains.new_chain(tmp_path / "other")
    for letter in "xyzuvw":
        other.add(chains.image_of(*[letter] * 6))
    return other


@pytest.mark.parametrize("number", [1, 2, 3])
def test_files_of_another_chain_over_existing_ones_are_found(chain: SmallChain, tmp_path: Path, number: int) -> None:
    for path in _files_of(_another_chain(tmp_path), number):
        shutil.copy(path, chain.directory)
    verdicts = chain.verdicts()
    assert any(verdicts.values())
    for n, error in verdicts.items():
        if error is None and n != number:
            assert chain.restored(n) == DAYS[n - 1]
    before = chain.files()
    with pytest.raises(DamagedError, match="was not built on the existing generation"):
        chain.add(DAYS[0])
    assert chain.files() == before


@pytest.mark.parametrize("numbers", [[4], [4, 5], [5, 6], [6], [4, 6]])
@pytest.mark.parametrize("version", [True, False])
def test_files_of_another_chain_beyond_the_last_are_moved_aside(
    chain: SmallChain, tmp_path: Path, numbers: list[int], version: bool
) -> None:
    other = _another_chain(tmp_path)
    foreign = [path for number in numbers for path in _files_of(other, number)]
    for path in foreign:
        shutil.copy(path, chain.directory)
    if not version:
        chain.file(".ver").unlink()
    assert chain.last() == 3
    assert chain.add(DAYS[0]).manifest.generation == 4
    chain.assert_sound()
    for path in foreign:
        assert chain.file(path.name[4:] + ".aside-1").read_bytes() == path.read_bytes()


def test_what_was_moved_aside_before_is_not_overwritten(chain: SmallChain) -> None:
    for content in (b"one", b"two"):
        last = chain.last()
        chain.file(f".{last + 1}.gz").write_bytes(content)
        chain.file(".9.gz").write_bytes(content)
        chain.add(DAYS[0])
    assert chain.file(".9.gz.aside-1").read_bytes() == b"one"
    assert chain.file(".9.gz.aside-2").read_bytes() == b"two"


def test_a_damaged_generation_does_not_make_the_complete_ones_behind_it_count_as_a_crash(chain: SmallChain) -> None:
    """``NAME.ver`` from an old copy, and one lost file: nothing that was complete may be moved away."""
    chain.file(".ver").write_bytes(b"1\n")
    chain.file(".2.gz").unlink()
    before = chain.files()
    with pytest.raises(DamagedError, match=r"disk\.2\.gz is missing"):
        chain.add(DAYS[0])
    assert {**chain.files(), "disk.ver": b""} == {**before, "disk.ver": b""}


def test_a_stray_file_of_a_huge_number_is_one_gap(chain: SmallChain) -> None:
    chain.file(".20261120.gz").write_bytes(b"somebody's dump of that day")
    result = commands.run("blockdiff", "list", chain.name)
    lines = result.stdout.decode().splitlines()
    assert len(lines) == 6 and "generations 4 to 20261119" in lines[4] and "incomplete" in lines[5]


# Exit statuses and words of the real commands


def test_the_damaged_generation_that_is_needed_is_named_and_what_to_do(chain: SmallChain, tmp_path: Path) -> None:
    _flip_in_the_middle(chain.file(".2.gz"))
    said = commands.run("blockdiff", "verify", chain.name).stderr.decode()
    assert "blockdiff: generation 3: it needs generation 2, which is damaged\n" in said
    assert f"  what is sound of one of these: blockdiff restore --salvage {chain.name}@N FILE; do that before" in said
    result = commands.run("blockdiff", "restore", chain.name, tmp_path / "out")
    said = result.stderr.decode()
    assert result.returncode == 5
    assert said.startswith("blockdiff: generation 3 needs generation 2, which is damaged: ") and "disk.2.gz" in said
    assert f"restore a sound generation (blockdiff verify {chain.name} says which), or what is sound of" in said
    assert f"of this one: blockdiff restore --salvage {chain.name}@3 FILE; do that before blockdiff repair\n" in said


def test_blocks_that_are_in_no_delta_are_told_in_sizes(chain: SmallChain, tmp_path: Path) -> None:
    for path in _files_of(chain, 1):
        path.unlink()
    said = commands.run("blockdiff", "restore", chain.name, tmp_path / "out").stderr.decode()
    assert (
        "generation 3 of disk cannot be restored: 128 bytes of it are not in the deltas of generations 2 to 3" in said
    )
    assert ", and generation 1 is missing" in said
    said = commands.run("blockdiff", "restore", f"{chain.name}@1", tmp_path / "out").stderr.decode()
    assert "generation 1 of" in said and f"blockdiff list {chain.name} shows which exist" in said


def test_a_full_generation_needs_none_that_is_damaged(chain: SmallChain) -> None:
    """And a younger one that lacks a block does not because of what was damaged before the full one."""
    chain.add(None, Options(full=True))
    chain.add(DAYS[0])
    chain.file(".2.gz").unlink()
    found = chain.verdicts()
    assert {number: found[number] is None for number in found} == {1: True, 2: False, 3: False, 4: True, 5: True}
    chain.file(".4.gz").write_bytes(chain.file(".4.gz").read_bytes()[:60])
    error = chain.verdict(5)
    assert error is not None and error.message == "it needs generation 4, which is damaged"


def test_verify_names_generation_and_file_of_all_that_is_damaged(chain: SmallChain, tmp_path: Path) -> None:
    _flip_in_the_middle(chain.file(".2.gz"))
    result = commands.run("blockdiff", "verify", chain.name)
    assert (result.returncode, result.stdout) == (5, b"")
    lines = result.stderr.decode().splitlines()
    assert any(line.startswith("blockdiff: generation 2: ") and "disk.2.gz is damaged" in line for line in lines)
    assert commands.run("blockdiff", "verify", f"{chain.name}@1").returncode == 0
    assert commands.run("blockdiff", "verify", f"{chain.name}@2").returncode == 5
    commands.done("blockdiff", "restore", f"{chain.name}@1", tmp_path / "one")
    assert (tmp_path / "one").read_bytes() == DAYS[0]
    failed = commands.run("blockdiff", "restore", f"{chain.name}@2", tmp_path / "two")
    assert failed.returncode == 5 and b"disk.2.gz" in failed.stderr
    assert [path.name for path in tmp_path.iterdir() if "two" in path.name] == []


def test_verify_of_a_sound_chain_says_nothing(chain: SmallChain) -> None:
    assert commands.done("blockdiff", "verify", chain.name) == b""


@pytest.mark.parametrize("command", ["list", "verify", "restore"])
def test_a_name_without_chain_and_a_number_without_generation_are_errors(
    chain: SmallChain, command: str, tmp_path: Path
) -> None:
    more = [tmp_path / "out"] if command == "restore" else []
    nothing = commands.run("blockdiff", command, f"{chain.name}x", *more)
    assert nothing.returncode == 1 and f"there is no chain {chain.name}x" in nothing.stderr.decode()
    beyond = commands.run("blockdiff", command, f"{chain.name}@4", *more)
    assert beyond.returncode == 1 and b"has no generation 4, the last one is 3" in beyond.stderr


def test_no_room_for_the_temporary_file_of_verify_is_no_damage(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def seek(self, place: int) -> None: ...

        def close(self) -> None: ...

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", lambda buffering: Full())
    with pytest.raises(BlockdiffError, match=r"cannot write a temporary file in .*: No space left on device") as caught:
        chain.verdicts()
    assert caught.value.exit_status == 1 and "TMPDIR" in str(caught.value.hint)


# Any damage

SUFFIXES = [f".{n}{suffix}" for n in (1, 2, 3) for suffix in (".gz", ".sha256", ".json")] + [".ver"]
FILES = st.sampled_from(SUFFIXES)
PLACES = st.floats(0, 1, exclude_max=True)
OPERATIONS = st.one_of(
    st.tuples(st.just("delete"), FILES),
    st.tuples(st.just("flip"), FILES, PLACES),
    st.tuples(st.just("cut"), FILES, PLACES),
    st.tuples(st.just("lengthen"), FILES),
    st.tuples(st.just("swap"), FILES, FILES),
    st.tuples(st.just("copy"), FILES, FILES),
)


def _operate(chain: SmallChain, operation: tuple[object, ...]) -> None:
    what, first, *more = operation
    path = chain.file(str(first))
    if not path.exists():
        return
    content = path.read_bytes()
    place = int(float(str(more[0])) * len(content)) if what in ("flip", "cut") else 0
    if what == "delete":
        path.unlink()
    elif what == "flip" and content:
        path.write_bytes(_flipped(content, 8 * place + place % 8))
    elif what == "cut":
        path.write_bytes(content[:place])
    elif what == "lengthen":
        path.write_bytes(content + content[-7:])
    elif what in ("swap", "copy"):
        other = chain.file(str(more[0]))
        if what == "swap" and other.exists():
            path.write_bytes(other.read_bytes())
        other.write_bytes(content)


@pytest.mark.parametrize("delta_format", [1, 2])
@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=st.lists(OPERATIONS, min_size=1, max_size=2))
def test_verify_and_restore_agree_whatever_happened_to_the_files(
    templates: Templates, delta_format: int, operations: list[tuple[object, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        chain = templates.copy(Path(directory), delta_format)
        for operation in operations:
            _operate(chain, operation)
        with Chain(chain.name) as found:
            numbers = list(found.generations)
        verdicts = {number: chain.verdict(number) for number in numbers if number <= 3}
        for number, error in verdicts.items():
            try:
                restored = chain.restored(number)
            except BlockdiffError as failure:
                assert failure.exit_status == 5, failure
                assert error is not None, (number, failure)
            else:
                assert error is not None or restored == DAYS[number - 1], number
        before = chain.files()
        try:
            chain.add(DAYS[1])
        except DamagedError:
            pass
        kept = {*chain.files().values()}
        assert all(content in kept for name, content in before.items() if name != "disk.ver"), "overwritten"
