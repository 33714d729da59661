"""A chain beside a model of it, a list of images, through any sequence of runs, crashes, damages and repairs."""

import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from blockdiff.backup import Options
from blockdiff.chain.generations import Chain
from blockdiff.check import repair
from blockdiff.shared.errors import BlockdiffError
from tests import chains, faults
from tests.chains import BLOCK, SmallChain
from tests.conftest import LARGE

pytestmark = [pytest.mark.torture, pytest.mark.timeout(1800)]

#: More steps than any run takes.
_MANY_STEPS = 60
_MAX_BLOCKS = 8


class ChainMachine(RuleBasedStateMachine):
    """`images` of the chain are the model: what each generation must give, if it gives anything."""

    def __init__(self) -> None:
        super().__init__()
        self._place = Path(tempfile.mkdtemp(prefix="blockdiff-model-", dir=LARGE))
        self._chain: SmallChain = chains.new_chain(self._place)
        self._image = bytearray(b"first")
        self._options: tuple[int, str] = (2, "sha256")
        self._harmed = False
        self._patch = pytest.MonkeyPatch()

    def teardown(self) -> None:
        shutil.rmtree(self._place)

    @initialize(kind=st.sampled_from([(2, "sha256"), (2, "xxh3"), (1, "md5")]))
    def begin(self, kind: tuple[int, str]) -> None:
        self._options = kind
        self._chain.add(bytes(self._image), self._chosen("gzip", full=False))

    def _chosen(self, compression: str, full: bool) -> Options:
        delta_format, digest = self._options
        return Options(block_size=BLOCK, delta_format=delta_format, digest=digest, compression=compression, full=full)

    # the source

    @rule(seed=st.integers(0, 1 << 16), count=st.integers(1, 3))
    def change(self, seed: int, count: int) -> None:
        chooser = random.Random(seed)
        for _ in range(count):
            at = chooser.randrange(len(self._image))
            self._image[at : at + 10] = chooser.choice([bytes(10), chooser.randbytes(10)])[: len(self._image) - at]

    @rule(size=st.integers(1, _MAX_BLOCKS * BLOCK))
    def resize(self, size: int) -> None:
        self._image = self._image[:size].ljust(size, b"\0")

    # what a user does

    @rule(compression=st.sampled_from(["gzip", "zstd", "none"]), full=st.booleans())
    def back_up(self, compression: str, full: bool) -> None:
        before = self._contents()
        last = max(self._chain.images, default=0)
        try:
            result = self._chain.add(bytes(self._image), self._chosen(compression, full))
        except BlockdiffError:
            assert self._harmed, "a run failed for no reason"
            assert before <= self._contents(), "a run that failed lost something"
        else:
            number = result.manifest.generation
            assert number == last + 1 or self._harmed
            self._assert_restores(number)

    def _contents(self) -> set[bytes]:
        """Return what must never get lost, whatever its name: not NAME.ver, which is derived, nor what is half done."""
        return {content for name, content in self._chain.files().items() if not name.endswith((".ver", ".tmp"))}

    def _assert_restores(self, number: int) -> None:
        """The new generation gives the image, unless an older one that it is built on was damaged before."""
        try:
            assert self._chain.restored(number) == bytes(self._image)
        except BlockdiffError:
            assert self._harmed

    @rule(step=st.integers(1, _MANY_STEPS), compression=st.sampled_from(["gzip", "zstd"]))
    def crash(self, step: int, compression: str) -> None:
        """The process dies at a step of its work on the chain."""
        self._chain.source.write_bytes(self._image)
        last = self._last()
        with faults.at_step(self._patch, step, None):
            try:
                self._chain.add(bytes(self._image), self._chosen(compression, full=False))
            except faults.Crash:
                pass
            except BlockdiffError:
                assert self._harmed
        found = self._last()
        if found is not None and (last is None or found == last + 1):
            self._chain.images[found] = bytes(self._image)  # it had come so far

    def _last(self) -> int | None:
        try:
            return self._chain.last()
        except BlockdiffError:
            return None

    @rule()
    def mend(self) -> None:
        """A repair keeps what was sound, and done again it has nothing to do."""
        sound = self._sound()
        try:
            repair.repair(self._chain.name)
        except BlockdiffError:
            assert self._harmed, "a repair failed for no reason"
            return
        assert repair.repair(self._chain.name).deeds == []
        assert sound <= self._sound()

    # what happens to files

    @precondition(lambda self: self._chain.files())
    @rule(which=st.floats(0, 1, exclude_max=True), where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
    def flip(self, which: float, where: float, bit: int) -> None:
        path = self._some_file(which)
        content = bytearray(path.read_bytes())
        if content:
            content[int(where * len(content))] ^= 1 << bit
            path.write_bytes(content)
        self._harmed = True

    @precondition(lambda self: self._chain.files())
    @rule(which=st.floats(0, 1, exclude_max=True))
    def lose(self, which: float) -> None:
        self._some_file(which).unlink()
        self._harmed = True
        left = {name.split(".")[1] for name in self._chain.files()}
        for number in {*self._chain.images} - {int(each) for each in left if each.isdigit()}:
            del self._chain.images[number]  # its number may be given again

    def _some_file(self, which: float) -> Path:
        names = sorted(self._chain.files())
        return self._chain.directory / names[int(which * len(names))]

    # what must hold after each step

    def _sound(self) -> set[int]:
        """Return the generations that verify."""
        with Chain(self._chain.name) as opened:
            if not opened.generations:
                return set()
        try:
            return {number for number, error in self._chain.verdicts().items() if error is None}
        except BlockdiffError:
            assert self._harmed
            return set()

    @invariant()
    def verify_and_restore_agree(self) -> None:
        """What verifies is exact, what does not is refused or exact, and without damage all are there."""
        sound = self._sound()
        for number, image in self._chain.images.items():
            try:
                restored = self._chain.restored(number)
            except BlockdiffError:
                assert number not in sound
            else:
                assert restored == image, f"generation {number} is wrong"
        assert self._harmed or sound == set(self._chain.images)


ChainMachine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, suppress_health_check=list(HealthCheck)
)
test_any_sequence = ChainMachine.TestCase
