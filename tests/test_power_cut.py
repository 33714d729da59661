"""The power is cut at every moment of a backup, a recovery, a repair and a restore: nothing reported is ever lost."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdiff import backup, merge
from blockdiff.chain import durable
from blockdiff.chain.commit import LockedChain
from blockdiff.chain.generations import Chain
from blockdiff.check import repair
from blockdiff.restore import filetarget, offsetwriter
from blockdiff.shared.errors import BlockdiffError
from blockdiff.transport.address import Address
from tests import chains, powercut
from tests.chains import DAYS, SmallChain
from tests.powercut import Found, History, each_state


class Finder:
    """Makes what was found after a power cut real, in memory where possible, and checks what a chain makes of it.

    `promised` are the generations that were reported successful before.
    """

    def __init__(self, chain: SmallChain, place: Path, promised: int) -> None:
        self._chain = chain
        self._place = place
        self._promised = promised
        self._passed: set[tuple[Found, bool]] = set()
        self._continued: set[Found] = set()

    def chain(self, found: Found) -> SmallChain:
        """Return the chain that was found."""
        directory = Path(tempfile.mkdtemp(dir=self._place)) / "found"
        found.put(directory)
        return SmallChain(directory, self._chain.source, self._chain.base, dict(self._chain.images))

    def check(self, found: Found, complete: bool) -> None:
        """All that was promised restores at once, and a chain that is put in order goes on."""
        if (found, complete) in self._passed:
            return
        chain = self.chain(found)
        promised = self._promised + complete
        for number in range(1, promised + 1):
            assert chain.restored(number) == chain.images[number]
        if promised:  # other tools read it, and nothing else
            assert chain.files().get(f"{chain.base}.ver") in (b"%d\n" % promised, b"%d\n" % (promised + (not complete)))
        with LockedChain(chain.name) as recovered:
            last = recovered.last()
        assert last in (promised, promised + (not complete))
        assert chain.temporary() == []
        if last:
            chain.assert_sound()
        self._go_on(chain)
        self._passed.add((found, complete))
        shutil.rmtree(chain.directory.parent)

    def _go_on(self, chain: SmallChain) -> None:
        """Add a generation, once for each state that differs in more than what was set aside."""
        files = frozenset((name, 0, data) for name, data in chain.files().items() if ".aside-" not in name)
        if Found(files) not in self._continued:
            self._continued.add(Found(files))
            last = chain.last()
            chain.add(DAYS[last % 3])
            assert chain.last() == last + 1
            chain.assert_sound()


@pytest.fixture
def place(large_tmp_path: Path) -> Path:
    return large_tmp_path


def told(history: History) -> int:
    """Return after how many steps success may be told: what follows needs no sync."""
    return history.syncs()[-1] + 1


def backup_history(place: Path, before: int, monkeypatch: pytest.MonkeyPatch) -> tuple[SmallChain, History]:
    """Return a chain that gets one generation after `before` others, and what was done to its directory."""
    chain = chains.some_days(place, before)
    with powercut.recorded(monkeypatch, chain.directory, durable) as history:
        chain.add(DAYS[before])
    return chain, history


@pytest.mark.parametrize("before", [0, 2])
def test_a_backup(place: Path, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    chain, history = backup_history(place, before, monkeypatch)
    assert each_state(history, told(history), Finder(chain, place, before).check) > 100


@pytest.mark.parametrize(("before", "needless"), [(0, ["SyncNames"]), (2, ["SyncNames"] * 3)])
def test_without_any_one_of_its_syncs_a_backup_breaks_its_promise(
    place: Path, before: int, needless: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one tries whether that can be done.

    Where there is a ``NAME.ver``, two tell nothing new: what is beyond it and lacks anything is incomplete.
    """
    chain, history = backup_history(place, before, monkeypatch)
    finder = Finder(chain, place, before)
    found = []
    for at in history.syncs():
        try:
            each_state(history.without(at), told(history) - 1, finder.check)
        except (AssertionError, BlockdiffError):
            continue
        found.append(type(history.steps[at]).__name__)
    assert found == needless
    assert len(history.syncs()) == 9


@pytest.mark.parametrize("before", [0, 2])
def test_a_recovery(place: Path, before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The power is cut once more, while the next run puts in order what the first cut has left."""
    chain, history = backup_history(place, before, monkeypatch)
    finder = Finder(chain, place, before)
    known: set[tuple[str, ...]] = set()

    def recover(found: Found, complete: bool) -> None:
        left = finder.chain(found)
        with powercut.recorded(monkeypatch, left.directory, durable) as recovery, LockedChain(left.name):
            pass
        shutil.rmtree(left.directory.parent)
        kind = tuple(map(_kind, recovery.steps))
        if not complete and kind not in known:
            known.add(kind)
            each_state(recovery, len(recovery.steps) + 1, finder.check)

    each_state(history, told(history), recover)
    assert len(known) > 10


def test_a_run_of_two_chains(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are committed one after the other: each is what it would be alone."""
    first = chains.some_days(place, 1)
    (place / "other-source").write_bytes(DAYS[2])
    second = SmallChain(first.directory, place / "other-source", "other")
    second.add()
    both = first, second
    first.source.write_bytes(DAYS[1])
    targets = [(each.name, str(each.source)) for each in both]
    with powercut.recorded(monkeypatch, first.directory, durable) as history:
        backup.backup_together(targets, Address(None, str(first.source)), backup.Options(block_size=chains.BLOCK))
    for each in both:
        each.images[2] = each.source.read_bytes()

    finders = [(f"{each.base}.", Finder(each, place, 1)) for each in both]

    def check(found: Found, complete: bool) -> None:
        for prefix, finder in finders:
            own = frozenset(file for file in found.files if file[0].lstrip(".").startswith(prefix))
            finder.check(Found(own), complete)

    assert each_state(history, told(history), check) > 200


def _kind(step: powercut.Step) -> str:
    return f"{type(step).__name__} {step[0] if isinstance(step, powercut.NameChange) else ''}"


def _without_version(chain: SmallChain) -> None:
    chain.file(".ver").unlink()


def _damaged_version(chain: SmallChain) -> None:
    chain.file(".ver").write_bytes(b"damaged")


def _without_manifest(chain: SmallChain) -> None:
    chain.file(".2.json").unlink()


def _damaged_last(chain: SmallChain) -> None:
    chain.file(".3.gz").write_bytes(b"damaged")


def _without_table(chain: SmallChain) -> None:
    chain.file(".3.sha256").unlink()


def _damaged_table(chain: SmallChain) -> None:
    chain.file(".3.sha256").write_bytes(b"damaged")


@pytest.mark.parametrize(
    "harm",
    [_without_version, _damaged_version, _without_manifest, _damaged_last, _without_table, _damaged_table],
)
def test_a_repair(place: Path, harm: Callable[[SmallChain], None], monkeypatch: pytest.MonkeyPatch) -> None:
    chain = chains.three_days(place)
    harm(chain)
    sound = 2 if harm is _damaged_last else 3
    restorable = 2 if harm in (_damaged_last, _without_table, _damaged_table) else 3
    finder = Finder(chain, place, sound)

    def check(found: Found, complete: bool) -> None:
        left = finder.chain(found)
        for again in range(2):
            for number in range(1, (sound if again else restorable) + 1):
                assert left.restored(number) == chain.images[number]
            told = repair.repair(left.name)
            assert not (again or complete) or told.deeds == []
        assert left.last() == sound
        left.assert_sound()
        shutil.rmtree(left.directory.parent)

    with powercut.recorded(monkeypatch, chain.directory, durable) as history:
        assert repair.repair(chain.name).deeds != []
    assert each_state(history, len(history.steps), check) > 3


@pytest.mark.parametrize("force", [False, True])
def test_a_restore_to_a_file(place: Path, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there as a whole, or what was there before is."""
    chain = chains.three_days(place)
    path = place / "restored" / "image"
    path.parent.mkdir()
    if force:
        path.write_bytes(b"before")
    with (
        powercut.recorded(monkeypatch, path.parent, filetarget, offsetwriter) as history,
        filetarget.FileTarget(str(path), force) as image,
        Chain(chain.name) as opened,
    ):
        merge.merge(opened.needed(3), image)

    def check(found: Found, complete: bool) -> None:
        content = next((data for name, _file, data in found.files if name == "image"), None)
        assert content == DAYS[2] or (not complete and content == (b"before" if force else None))

    assert each_state(history, told(history), check) > 10
    for at in history.syncs():
        with pytest.raises(AssertionError):
            each_state(history.without(at), told(history) - 1, check)
    assert len(history.syncs()) == 2
