"""The proofs of `verify --deep` and `--subset` agree with that of `verify`; `--source` finds what differs."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.chain.generations import Chain
from blockdiff.check import proofs
from blockdiff.shared.errors import DamagedError
from tests import chains, commands
from tests.chains import BLOCK, DAYS, SmallChain
from tests.sshd import Sshd

Proof = Callable[[Chain, int], None]


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


@pytest.fixture
def original(tmp_path: Path) -> SmallChain:
    """A chain as the original leaves it: format 1, MD5, no manifests."""
    return chains.without_manifests(
        chains.three_days(tmp_path, Options(block_size=BLOCK, delta_format=1, digest="md5"))
    )


def failing(chain: SmallChain, proof: Proof) -> list[int]:
    """Return the generations that a proof finds wrong."""
    found = []
    with Chain(chain.name) as opened:
        for number in opened.generations:
            try:
                proof(opened, number)
            except DamagedError:
                found.append(number)
    return found


def test_sound_generations_pass(tmp_path: Path) -> None:
    for i, options in enumerate(
        Options(block_size=BLOCK, delta_format=delta_format, compression=compression, digest=digest)
        for delta_format, compression, digest in ((2, "gzip", "sha256"), (2, "zstd", "xxh3"), (1, "none", "md5"))
    ):
        (tmp_path / str(i)).mkdir()
        chain = chains.three_days(tmp_path / str(i), options)
        chain.add(DAYS[0], Options(block_size=BLOCK, full=True, delta_format=options.delta_format))
        chain.add(bytes(70 * BLOCK))
        chain.add(bytes(71 * BLOCK))
        assert failing(chain, proofs.alone) == failing(chain, proofs.put_together) == []


@pytest.mark.parametrize("kind", ["chain", "original"])
def test_whatever_byte_is_flipped_all_proofs_agree(request: pytest.FixtureRequest, kind: str) -> None:
    """Alone, a generation need not be found wrong where the one at fault is; but one is wherever `verify` finds one."""
    chain: SmallChain = request.getfixturevalue(kind)
    chooser = random.Random(7)
    found = 0
    for path in sorted(chain.directory.iterdir()):
        content = path.read_bytes()
        if path.suffix in (".lock", ".ver"):
            continue
        for position in chooser.sample(range(len(content)), min(len(content), 40)):
            path.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
            bad = chain.bad()
            # a flipped bit in the header of a compressed member is damage that no restore meets
            assert set(failing(chain, proofs.put_together)) <= set(bad)
            assert bool(failing(chain, proofs.alone)) == bool(bad), (path.name, position)
            found += bool(bad)
        path.write_bytes(content)
    assert found > 200 and chain.bad() == []


@pytest.mark.parametrize("suffix", [".gz", ".md5"])
def test_alone_a_generation_needs_the_table_before_it_unless_it_carries_all(original: SmallChain, suffix: str) -> None:
    original.file(".2" + suffix).unlink()
    assert failing(original, proofs.alone) == ([2] if suffix == ".gz" else [2, 3])


def test_alone_the_first_generation_must_carry_all(chain: SmallChain) -> None:
    for path in chain.directory.glob("disk.1.*"):
        path.unlink()
    assert failing(chain, proofs.alone) == [2]
    with Chain(chain.name) as opened, pytest.raises(DamagedError) as caught:
        proofs.alone(opened, 2)
    assert caught.value.message == (
        f"the delta of {chain.file('.2')} does not have the block at offset 0, and generation 1 is missing"
    )


def test_a_table_that_changed_more_than_its_delta_is_found(original: SmallChain) -> None:
    table = original.file(".2.md5")
    content = bytearray(table.read_bytes())
    content[4] ^= 1
    table.write_bytes(content)
    with Chain(original.name) as opened, pytest.raises(DamagedError, match="at offset 0, and its digest changed"):
        proofs.alone(opened, 2)


def test_the_command_proves_by_parts_and_deep(chain: SmallChain) -> None:
    for arguments in (["--deep"], ["--subset", "1/1"], ["--deep", "--subset", "2/2"]):
        assert commands.done("blockdiff", "verify", *arguments, chain.name) == b""
    chain.file(".2.gz").write_bytes(b"short")
    said = {}
    for part in ("1/3", "2/3", "3/3", "1/2", "2/2"):
        result = commands.run("blockdiff", "verify", "--subset", part, chain.name)
        assert result.returncode == (5 if part in ("2/3", "2/2") else 0)
        said[part] = result.stderr.decode()
    expected = re.escape(f"blockdiff: generation 2: {chain.file('.2.gz')} has 5 bytes instead of ") + "[0-9]+\n"
    assert re.match(expected, said["2/3"])
    assert commands.run("blockdiff", "verify", "--deep", f"{chain.name}@1").returncode == 0
    assert commands.run("blockdiff", "verify", "--deep", f"{chain.name}@2").returncode == 5


def test_a_gap_is_told_in_every_part(chain: SmallChain) -> None:
    for path in chain.directory.glob("disk.2.*"):
        path.unlink()
    for part in ("1/2", "2/2"):
        result = commands.run("blockdiff", "verify", "--subset", part, chain.name)
        assert result.returncode == 5 and b"generation 2: none of its files is there" in result.stderr


@pytest.mark.parametrize("part", ["0/3", "4/3", "3", "a/b", "1/0"])
def test_what_is_no_part_is_refused(chain: SmallChain, part: str) -> None:
    result = commands.run("blockdiff", "verify", "--subset", part, chain.name)
    assert result.returncode == 2 and b"is not a part like 3/7" in result.stderr


def test_options_that_contradict_each_other_are_refused(chain: SmallChain) -> None:
    for arguments in (["--subset", "1/2", f"{chain.name}@1"], ["--deep", "--source", "/x", chain.name]):
        assert commands.run("blockdiff", "verify", *arguments).returncode == 2


def test_the_source_is_compared(chain: SmallChain) -> None:
    assert commands.done("blockdiff", "verify", "--source", chain.source, chain.name) == b""
    result = commands.run("blockdiff", "verify", "--source", chain.source, f"{chain.name}@2")
    assert result.returncode == 1
    # the third day has another third block, a shorter fifth one, and no more
    assert result.stdout == b"%d %d\n%d %d\n" % (2 * BLOCK, BLOCK, 4 * BLOCK, BLOCK - 1)
    assert result.stderr.decode() == (
        f"blockdiff: {chain.source} differs from generation 2 in blocks of {2 * BLOCK - 1} bytes, "
        f"and has {len(DAYS[2])} bytes, not {len(DAYS[1])}\n"
    )
    before = chain.files()
    chain.source.write_bytes(DAYS[2] + b"more")
    assert commands.run("blockdiff", "verify", "--source", chain.source, chain.name).returncode == 1
    assert chain.files() == before


def test_a_source_that_became_shorter_differs_without_a_manifest_too(original: SmallChain) -> None:
    original.source.write_bytes(DAYS[2][: 2 * BLOCK])
    result = commands.run("blockdiff", "verify", "--source", original.source, original.name)
    assert (result.returncode, result.stdout) == (1, b"%d %d\n" % (2 * BLOCK, 3 * BLOCK))


def test_a_source_on_a_host_is_compared(chain: SmallChain, sshd: Sshd) -> None:
    where = sshd.url(chain.source)
    assert commands.done("blockdiff", "verify", "--source", where, *sshd.arguments, chain.name) == b""
    chain.source.write_bytes(DAYS[1])
    result = commands.run("blockdiff", "verify", "--source", where, *sshd.arguments, chain.name)
    assert result.returncode == 1 and b"differs from generation 3" in result.stderr


def test_a_source_that_is_not_there_is_told(chain: SmallChain) -> None:
    result = commands.run("blockdiff", "verify", "--source", "/none", chain.name)
    assert result.returncode == 1 and b"cannot open /none" in result.stderr
