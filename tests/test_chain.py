"""A chain as it is found: which files belong to it, which generation is the last, and reading while others write."""

from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.chain.durable import Directory
from blockdiff.chain.generations import Chain
from blockdiff.shared.errors import DamagedError
from tests import chains
from tests.chains import BLOCK, DAYS, SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    return chains.three_days(tmp_path)


def test_other_files_are_none_of_the_chain(chain: SmallChain) -> None:
    for name in (
        *("disk.0.gz", "disk.04.gz", "disk.4.tar", "disk.4.gz.bak", "disk.4.gz.aside-1", "disk.x.gz", "disks.4.gz"),
        *("xdisk.4.gz", ".disk.4.gz.tmp", "disk.-4.gz", "disk.4.", "disk.4.GZ", "disk.4.gz\n", "disk.\u0664.gz"),
    ):
        (chain.directory / name).touch()
    with Chain(chain.name) as found:
        assert list(found.generations) == [1, 2, 3] and found.last() == 3


def test_generations_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    for number in range(11):
        chain.add(b"%d" % number * BLOCK)
    with Chain(chain.name) as found:
        assert list(found.generations) == list(range(1, 12))
    chain.assert_sound()


def test_needed_generations_end_at_a_full_one_or_a_gap(chain: SmallChain) -> None:
    chain.add(DAYS[0], Options(full=True))
    chain.add(DAYS[1])
    for path in chain.directory.glob("disk.2.*"):
        path.unlink()
    with Chain(chain.name) as found:
        assert [generation.number for generation in found.needed(5)] == [5, 4]
        assert [generation.number for generation in found.needed(3)] == [3]
        assert [generation.number for generation in found.needed(1)] == [1]


def test_gaps_are_spans(chain: SmallChain) -> None:
    with Chain(chain.name) as found:
        assert list(found.spans(3)) == [(1, 1), (2, 2), (3, 3)]
        assert list(found.spans(2)) == [(1, 1), (2, 2)]
        assert list(found.spans(9)) == [(1, 1), (2, 2), (3, 3), (4, 9)]
        del found.generations[2]
        assert list(found.spans(4)) == [(1, 1), (2, 2), (3, 3), (4, 4)]
        del found.generations[1]
        assert list(found.spans(3)) == [(1, 2), (3, 3)]
        del found.generations[3]
        assert list(found.spans(5)) == [(1, 5)]


def test_a_run_that_ends_while_the_directory_is_read_does_not_look_like_a_loss(
    chain: SmallChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The names are read before or after the version, and a run may commit in between."""
    template = chain.files()
    for method in ("names", "read"):
        real = getattr(Directory, method)
        runs: list[int] = []

        def late(self: Directory, *arguments: object, real: object = real, runs: list[int] = runs) -> object:
            assert callable(real)
            result = real(self, *arguments)
            if not runs:
                runs.append(1)
                chain.add(DAYS[0])
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Directory, method, late)
            with Chain(chain.name) as found:
                assert found.last() in (len(template) // 3, len(template) // 3 + 1)
                assert found.last() in found.generations
        for path in chain.directory.iterdir():
            if path.name not in template:
                path.unlink()
        chain.file(".ver").write_bytes(template["disk.ver"])


def test_two_deltas_of_one_generation_need_a_manifest_to_tell(chain: SmallChain) -> None:
    for suffix in (".md5", ".zst"):
        chain.file(f".2{suffix}").write_bytes(b"stray")
    chain.assert_sound()
    chains.without_manifests(chain)
    with pytest.raises(DamagedError, match=r"the delta of .*disk\.2 exists more than once: .*disk\.2\.zst"):
        chain.restored(2)
    chain.file(".2.zst").unlink()
    with pytest.raises(DamagedError, match=r"the digest table of .*disk\.2 exists more than once: .*disk\.2\.md5"):
        chain.restored(2)


def test_a_chain_of_the_original_gets_manifests_as_it_goes_on(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    old = Options(block_size=BLOCK, delta_format=1, digest="md5")
    chain.add(DAYS[0], old)
    chain.add(DAYS[1], old)
    chains.without_manifests(chain)
    made = chain.add(DAYS[2]).manifest
    assert (made.delta_format, made.digest, made.full) == (1, "md5", False)
    assert made.parent is not None and (made.parent.generation, made.parent.manifest_sha256) == (2, None)
    chain.add(DAYS[0])
    chain.file(".ver").unlink()  # there are manifests now
    chain.add(DAYS[1])
    chain.assert_sound()
