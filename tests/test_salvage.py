"""What `restore --salvage` makes of damaged chains: exact where it says so, zero and told elsewhere."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdiff.backup import Options
from blockdiff.chain.generations import Chain
from blockdiff.format import codec
from blockdiff.restore import salvage
from blockdiff.shared.errors import DamagedError
from tests import chains, commands
from tests.chains import BLOCK, DAYS, MemoryTarget, SmallChain

#: Large enough for several members of a delta.
LARGE_BLOCK = 4096
MEMBERS_BYTES = 12 << 20


def salvaged(chain: SmallChain, number: int) -> tuple[bytes, salvage.Salvaged]:
    """Salvage a generation; what is not told as lost must be exact."""
    target = MemoryTarget()
    with Chain(chain.name) as opened:
        found = salvage.salvage(opened, number, target)
    image = bytes(target.image)
    expected = bytearray(chain.images[number])
    assert len(image) == found.image_size
    for offset, length in found.lost:
        expected[offset : offset + length] = bytes(len(expected[offset : offset + length]))
    assert image == bytes(expected)
    return image, found


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


@pytest.mark.parametrize("compression", ["gzip", "zstd", "none"])
@pytest.mark.parametrize("delta_format", [1, 2])
def test_of_a_sound_chain_nothing_is_lost(tmp_path: Path, compression: str, delta_format: int) -> None:
    chain = chains.three_days(tmp_path, Options(block_size=BLOCK, compression=compression, delta_format=delta_format))
    for number in (1, 2, 3):
        image, found = salvaged(chain, number)
        assert image == chain.images[number] and found.lost == [] and found.notes == []


def test_without_manifests_as_well(tmp_path: Path) -> None:
    options = Options(block_size=BLOCK, digest="md5", delta_format=1)
    chain = chains.without_manifests(chains.three_days(tmp_path, options))
    for number in (1, 2, 3):
        assert salvaged(chain, number)[0] == chain.images[number]


def test_a_missing_delta_loses_what_only_it_had(chain: SmallChain) -> None:
    chain.file(".2.gz").unlink()
    _image, found = salvaged(chain, 3)
    assert found.lost == [(BLOCK, BLOCK)]  # the second block, of the second day
    assert found.notes == [f"{chain.file('.2.gz')} is missing"]
    assert salvaged(chain, 1)[1].lost == []


def test_a_gap_loses_no_more(chain: SmallChain) -> None:
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    assert salvaged(chain, 3)[1].lost == [(0, BLOCK), (3 * BLOCK, BLOCK)]


def test_a_damaged_table_costs_the_blocks_whose_digests_are_wrong(chain: SmallChain) -> None:
    path = chain.file(".3.sha256")
    content = bytearray(path.read_bytes())
    content[4 + 32 * 2] ^= 1
    path.write_bytes(content)
    _image, found = salvaged(chain, 3)
    assert found.lost == [(2 * BLOCK, BLOCK)]
    assert found.notes == [f"{path} is damaged: its checksum is not that in the manifest"]


def test_without_a_table_nothing_tells_what_is_sound(chain: SmallChain) -> None:
    chain.file(".3.sha256").unlink()
    with pytest.raises(DamagedError, match=r"\.3\.sha256 is missing"):
        salvaged(chain, 3)


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_behind_a_damaged_member_the_next_ones_are_found(tmp_path: Path, compression: str) -> None:
    chain = chains.new_chain(tmp_path)
    chain.add(random.Random(3).randbytes(MEMBERS_BYTES), Options(block_size=LARGE_BLOCK, compression=compression))
    path = chain.file(".1" + codec.SUFFIXES[compression])
    content = bytearray(path.read_bytes())
    sized = codec._GZIP_SIZED if compression == "gzip" else codec._ZSTD_SIZED
    starts = [at for at in range(len(content)) if content.startswith(sized, at)]
    assert len(starts) > 5
    for at in (starts[0] + 100, starts[2] + len(sized) + 1, starts[4]):  # content, length, magic
        content[at] ^= 0x40
    content[starts[-1] + 1000 :] = b""
    path.write_bytes(content)
    _image, found = salvaged(chain, 1)
    # four members at most, neighbours as one range
    assert 2 <= len(found.lost) <= 4
    assert 4 << 20 <= sum(length for _offset, length in found.lost) <= 8 << 20


@given(
    seed=st.integers(0, 2**32),
    options=st.sampled_from(
        [
            Options(block_size=BLOCK, delta_format=delta_format, compression=compression)
            for delta_format in (1, 2)
            for compression in ("gzip", "zstd", "none")
        ]
    ),
)
@settings(max_examples=60)
def test_whatever_is_damaged_what_is_written_is_exact(
    tmp_path_factory: pytest.TempPathFactory, seed: int, options: Options
) -> None:
    chain = chains.three_days(tmp_path_factory.mktemp("salvage"), options)
    chooser = random.Random(seed)
    for path in chooser.sample(sorted(chain.directory.glob("disk.[123]*")), 3):
        chains.harm(path, chooser)
    for number in (1, 2, 3):
        target = MemoryTarget()
        try:
            with Chain(chain.name) as opened:
                opened.generation(number)
                found = salvage.salvage(opened, number, target)
        except DamagedError:
            continue
        expected = chain.images[number].ljust(found.image_size, b"\0")
        lost: set[int] = set()
        for offset, length in found.lost:
            lost.update(range(offset, offset + length))
        for i, byte in enumerate(bytes(target.image)):
            assert byte == (0 if i in lost else expected[i]), (number, i)


def test_the_command_prints_what_is_lost_and_never_exits_0(chain: SmallChain, tmp_path: Path) -> None:
    result = commands.run("blockdiff", "restore", "--salvage", chain.name, tmp_path / "sound")
    assert (result.returncode, result.stdout) == (3, b"") and b"--salvage was not needed" in result.stderr
    assert (tmp_path / "sound").read_bytes() == DAYS[2]
    chain.file(".2.gz").unlink()
    assert commands.run("blockdiff", "restore", chain.name, tmp_path / "out").returncode == 5
    result = commands.run("blockdiff", "restore", "--salvage", chain.name, tmp_path / "out")
    assert (result.returncode, result.stdout) == (5, b"%d %d\n" % (BLOCK, BLOCK))
    assert result.stderr.decode().splitlines() == [
        f"blockdiff: note: {chain.file('.2.gz')} is missing",
        f"blockdiff: {BLOCK} bytes of {len(DAYS[2])} bytes are lost, and zero in what was restored",
    ]
    image = bytearray(DAYS[2])
    image[BLOCK : 2 * BLOCK] = bytes(BLOCK)
    assert (tmp_path / "out").read_bytes() == image
