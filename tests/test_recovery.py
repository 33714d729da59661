"""A run that dies at any step: what the next one finds, and what it makes of it."""

import shutil
from pathlib import Path

import pytest

from blockdiff.chain import listing
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Chain
from blockdiff.shared.errors import DamagedError
from tests import chains, faults
from tests.chains import DAYS, SmallChain

MAX_STEPS = 100


def _die_in_a_run(chain: SmallChain, at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Let a run die at step `at`; return False where it has fewer steps."""
    with faults.at_step(monkeypatch, at, None) as faulty:
        try:
            chain.add(DAYS[len(chain.images)])
        except faults.Crash:
            return True
    assert faulty.failed is None
    return False


def _die_in_recovery(chain: SmallChain, at: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    with faults.at_step(monkeypatch, at, None) as faulty:
        try:
            LockedChain(chain.name).close()
        except faults.Crash:
            return True
    assert faulty.failed is None
    return False


def _next_run(chain: SmallChain, reported: int) -> None:
    """The run after a crash: nothing that was reported is lost, and the chain goes on."""
    assert [chain.restored(n) for n in range(1, reported + 1)] == [*DAYS[:reported]]
    result = chain.add(DAYS[2])
    # a generation whose manifest was linked is complete, whether or not anybody was told
    assert result.manifest.generation in (reported + 1, reported + 2)
    if result.manifest.generation == reported + 2:
        chain.images[reported + 1] = DAYS[reported]
    chain.assert_sound()
    assert chain.file(".ver").read_bytes() == b"%d\n" % result.manifest.generation


@pytest.mark.parametrize("reported", [0, 1, 2])
def test_the_run_after_a_crash_at_any_step_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reported: int
) -> None:
    """And so does one after a second crash, at any step of putting things in order."""
    template = chains.new_chain(tmp_path)
    for image in DAYS[:reported]:
        template.add(image)
    crashes = 0
    for at in range(1, MAX_STEPS):
        chain = template.copy_to(tmp_path / f"crashed-{at}")
        if not _die_in_a_run(chain, at, monkeypatch):
            break
        crashes += 1
        for again in range(1, MAX_STEPS):
            twice = chain.copy_to(tmp_path / "twice")
            _relink(chain, twice)
            died = _die_in_recovery(twice, again, monkeypatch)
            if again == 1 or died:
                with LockedChain(twice.name) as recovered:
                    assert recovered.last() in (reported, reported + 1)
                assert [twice.restored(n) for n in range(1, reported + 1)] == [*DAYS[:reported]]
                assert twice.temporary() == []
            shutil.rmtree(twice.directory)
            if not died:
                break
        _next_run(chain, reported)
        shutil.rmtree(chain.directory)
    assert crashes > 15


def _relink(chain: SmallChain, copy: SmallChain) -> None:
    """Give names that were those of one file to one file in the copy as well."""
    for path in chain.directory.glob("*.tmp"):
        final = chain.directory / path.name[1:-4]
        if final.exists() and final.samefile(path):
            (copy.directory / path.name).unlink()
            (copy.directory / path.name).hardlink_to(copy.directory / final.name)


def test_a_first_generation_that_was_never_completed_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = chains.new_chain(tmp_path)
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[0])
    assert chain.file(".1.gz").exists() and chain.file(".1.sha256").exists() and not chain.file(".1.json").exists()
    result = chain.add(DAYS[1])
    assert result.manifest.generation == 1
    assert chain.file(".1.gz.aside-1").exists() and chain.file(".1.sha256.aside-1").exists()
    assert len(result.recovered) == 2 and "disk.1.gz was never completed" in result.recovered[0]
    chain.assert_sound()


def test_the_same_files_without_their_temporary_names_are_no_crash_of_ours(tmp_path: Path) -> None:
    """They may be a chain of the original that lost its ``.ver``."""
    chain = chains.new_chain(tmp_path)
    chain.add(DAYS[0])
    chain.file(".1.json").unlink()
    chain.file(".ver").unlink()
    before = chain.files()
    with pytest.raises(DamagedError, match=r"disk\.ver is missing"):
        chain.add(DAYS[1])
    assert chain.files() == before


def test_list_shows_what_a_crash_left_as_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chains.new_chain(tmp_path)
    chain.add(DAYS[0])
    with faults.at_step(monkeypatch, 4, None, ("link",)), pytest.raises(faults.Crash):
        chain.add(DAYS[1])
    with Chain(chain.name) as found:
        assert [entry.state for entry in listing.entries(found)] == ["ok", "incomplete"]
    assert chain.bad() == [] and chain.restored() == DAYS[0]


def test_only_temporary_files_of_this_chain_are_removed(tmp_path: Path) -> None:
    """``.disk.1.2.tmp`` and ``.disk.1.ver.tmp`` belong to a chain called ``disk.1``."""
    chain = chains.new_chain(tmp_path)
    ours = [".disk.ver.tmp", ".disk.7.tmp", ".disk.7.gz.tmp", ".disk.7.sha256.tmp", ".disk.7.json.tmp"]
    others = [".disk.1.2.tmp", ".disk.1.ver.tmp", ".disk.1.2.gz.tmp", ".diskette.1.gz.tmp", ".disk.x.tmp", ".disk.tmp"]
    for name in ours + others:
        (chain.directory / name).touch()
    chain.add(DAYS[0])
    assert sorted(chain.temporary()) == sorted(others)


def test_a_version_file_that_is_behind_after_a_crash_is_put_right(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)
    chain.file(".ver").write_bytes(b"2\n")
    result = chain.add(DAYS[0])
    assert result.manifest.generation == 4
    assert result.recovered == [f"{chain.file('.ver')} was corrected: generation 3 is the last complete one"]
    chain.assert_sound()
