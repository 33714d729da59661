"""A network that cuts, stalls, delays, repeats or garbles at every boundary of the stream, and what a run makes of it.

Whatever happens, a run either adds a generation that restores exactly, or says why not, names the host, and leaves the
chain as it was; no process outlives it, and the next run adds its generation.
"""

import os
import re
import select
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.host import loader
from blockdiff.shared import wire
from blockdiff.shared.errors import BlockdiffError, ConnectionLost, ProtocolError, TransportError
from blockdiff.transport import bundle, child, connection, openssh
from blockdiff.transport.address import Address
from blockdiff.transport.advice import Place
from blockdiff.transport.connection import Exit
from tests import chains, commands, faulty_ssh, processes
from tests.chains import BLOCK, DAYS, SmallChain
from tests.faulty_ssh import BEGIN, DOWN, END, UP, Fault, Point

pytestmark = pytest.mark.torture

HOST = "web1"
#: What the disturbed run takes: there is all that an agent can say of an image in it.
LATEST = chains.image_of("a", "h", "i", "0", "d", "k", "0", "l*9")
#: How long the server waits after a fault for anything to come, in seconds.
PATIENCE_S = 2.0
#: How long the server may be silent before the agent gives up, and how often both say that they live, in seconds.
SILENCE_S = 5.0
HEARTBEAT_S = 0.5
#: No fault may keep a run for longer, in seconds: many times what the patience of both sides comes to.
LIMIT_S = 60.0
#: Runs at a time: most of them wait for something.
WORKERS = 12
#: Pieces of the start, which have no CRC, in front of the first frame.
START = {UP: 4, DOWN: 1}
#: An image whose digest table is larger than what may be under way of it.
LARGE_SIZE = 4 << 20
NOWHERE = Point(UP, -1, BEGIN, 0)


class Connection(openssh.SshConnection):
    """Has little patience once the fault has happened, and as much as it takes before: no start is too slow for it."""

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        super().__init__(address, options)
        self._fault = faulty_ssh.from_option(options[0])
        self._hurried = self._fault.kind not in (faulty_ssh.RECORD, faulty_ssh.DELAY)
        self._readable = select.poll()
        self._readable.register(self._output, select.POLLIN)

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        if not self._hurried:
            return super().readinto(view, timeout_s)
        deadline = time.monotonic() + timeout_s
        while not (self._readable.poll(20) or self._fault.applied.exists()):
            if time.monotonic() > deadline:
                raise ConnectionLost("nothing comes, and no fault is the reason", silent=True)
        try:
            return super().readinto(view, min(timeout_s, PATIENCE_S))
        except ConnectionLost as error:  # as after the 90 s of the whole start, which nobody wants to wait for
            raise ConnectionLost(error.message) from error

    def wait(self, timeout_s: float) -> Exit | None:
        return super().wait(min(timeout_s, PATIENCE_S) if self._hurried else timeout_s)


class Scene:
    """A chain of some days on a host behind the network, its next day, and the pieces of the run that takes that."""

    def __init__(self, directory: Path, days: Sequence[bytes], latest: bytes) -> None:
        self._directory = directory
        self._next = len(days) + 1
        self.chain = chains.new_chain(directory)
        for day in days:
            self.chain.source.write_bytes(day)
            self.run(self.chain, self._undisturbed("day"))
        self.chain.source.write_bytes(latest)
        recording = self._undisturbed("recorded")
        self.run(self.chain.copy_to(directory / "copy"), recording)
        self.pieces = {way: list(_recorded(recording, way)) for way in (UP, DOWN)}

    def _undisturbed(self, name: str) -> Fault:
        place = self._directory / name
        place.mkdir(exist_ok=True)
        return Fault(faulty_ssh.RECORD, NOWHERE, str(place))

    def run(self, chain: SmallChain, fault: Fault) -> None:
        """Take the source as it is; raises what a backup raises."""
        options = backup.Options(block_size=BLOCK, transport="ssh", ssh_options=(fault.option(),))
        result = backup.backup(chain.name, Address(HOST, str(chain.source)), options)
        chain.images[result.manifest.generation] = chain.source.read_bytes()

    def behind(self, way: str) -> list[Point]:
        """Return where a fault can come after k bytes: k at every boundary, and one byte to either side."""
        return [Point(way, 0, BEGIN, 0), *self._around(way, END)]

    def bytes_of(self, way: str) -> list[Point]:
        """Return the byte behind every boundary, and its neighbours."""
        return [Point(way, 0, BEGIN, 0), *self._around(way, BEGIN)]

    def boundaries(self, way: str) -> list[Point]:
        return [point for point in self.behind(way) if not point.shift]

    def _around(self, way: str, edge: str) -> list[Point]:
        points = [Point(way, 0, BEGIN, 1)]
        for number in range(1, len(self.pieces[way])):
            points.append(Point(way, number - 1, END, -1))
            points.append(Point(way, number, BEGIN, 0) if edge == BEGIN else Point(way, number - 1, END, 0))
            points.append(Point(way, number, BEGIN, 1))
        last = len(self.pieces[way]) - 1
        return [*points, Point(way, last, END, -1), *([Point(way, last, END, 0)] if edge == END else [])]

    def disturbed(self, faults: Sequence[Fault], directory: Path) -> list[BlockdiffError | None]:
        """Run under one fault after the other, and then under none; return how the runs ended, None for a success.

        Each finds what the ones before have left of the chain, as long as that did not grow.
        """
        ends: list[BlockdiffError | None] = []
        chain = self.chain.copy_to(directory / "chain-0")
        for number, fault in enumerate(faults, 1):
            ends.append(self._under(fault, chain))
            if ends[-1] is None:
                chain = self.chain.copy_to(directory / f"chain-{number}")
        self.run(chain, self._undisturbed("next"))
        assert chain.last() == self._next
        chain.assert_sound()
        return ends

    def _under(self, fault: Fault, chain: SmallChain) -> BlockdiffError | None:
        before, begun, ended = chain.files(), time.monotonic(), None
        try:
            self.run(chain, fault)
        except (TransportError, ProtocolError) as error:
            assert HOST in error.message and error.message.isprintable(), (fault, error)
            # an agent that was given up as silent may have been in the middle of saying why it ends
            assert "Traceback" not in error.message or "silent" in error.message, (fault, error)
            assert chain.files() == before, fault
            ended = error
        else:
            assert chain.last() == self._next
        assert time.monotonic() - begun < LIMIT_S, fault
        assert fault.applied.exists(), (fault, ended)
        chain.assert_sound()
        return ended


def _recorded(recording: Fault, way: str) -> Iterator[bytes]:
    with recording.recorded(way).open("rb") as file:
        try:
            yield from faulty_ssh.pieces(way, file.read)
        except faulty_ssh.EndOfStreamError as end:
            assert not end.rest


@pytest.fixture(scope="module")
def mark() -> Iterator[str]:
    """A mark in the environment of all that is started here."""
    found = processes.new_mark()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in processes.environment(found).items():
            patch.setenv(name, value)
        yield found
    processes.end(found)


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, mark: str) -> Iterator[Scene]:
    directory = tmp_path_factory.mktemp("network")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{faulty_ssh.install(directory)}:{commands.PATH}")
        patch.setattr(openssh, "SshConnection", Connection)
        yield Scene(directory, DAYS[:2], LATEST)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the agent take the server for lost after a few seconds of silence; both say more often that they live."""
    monkeypatch.setattr(wire, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(bundle, "_source", _with_constants(bundle._source))
    bundle._archive.cache_clear()
    yield
    bundle._archive.cache_clear()


def _with_constants(source: Callable[[str], str]) -> Callable[[str], str]:
    def changed(name: str) -> str:
        text = source(name)
        for constant, value in (
            (("SILENCE_S", SILENCE_S), ("HEARTBEAT_S", HEARTBEAT_S)) if name == "shared/wire.py" else ()
        ):
            text, count = re.subn(f"^{constant} = .*", f"{constant} = {value}", text, flags=re.MULTILINE)
            assert count == 1
        return text

    return changed


Ends = dict[tuple[str, Point], BlockdiffError | None]


class Trials:
    """Runs of the scene, several at a time, each under a fault of its own."""

    def __init__(self, scene: Scene, mark: str, directory: Path) -> None:
        self.scene = scene
        self._mark = mark
        self._directory = directory

    def ends(self, cases: Sequence[tuple[str, Point]]) -> Ends:
        """Return how the run ended for each kind of fault and point; nothing of it is left when this returns."""
        groups = [cases[start::WORKERS] for start in range(min(WORKERS, len(cases)))]
        with ThreadPoolExecutor(WORKERS) as pool:
            found = list(pool.map(self._group, range(len(groups)), groups))
        processes.wait_until_gone(self._mark)
        return {case: end for group, ends in zip(groups, found) for case, end in zip(group, ends, strict=True)}

    def _group(self, number: int, cases: Sequence[tuple[str, Point]]) -> list[BlockdiffError | None]:
        faults: list[Fault] = []
        for kind, point in cases:
            place = self._directory / f"{number}-{len(faults)}"
            place.mkdir()
            faults.append(Fault(kind, point, str(place)))
        place = self._directory / f"{number}"
        place.mkdir()
        return self.scene.disturbed(faults, place)


@pytest.fixture
def trials(scene: Scene, mark: str, tmp_path: Path) -> Trials:
    return Trials(scene, mark, tmp_path)


def succeeded(ends: Ends) -> list[tuple[str, Point]]:
    return [case for case, error in ends.items() if error is None]


def test_the_program_knows_frames_as_we_do(scene: Scene) -> None:
    assert (faulty_ssh.HEADER.format, faulty_ssh.ALIVE) == (wire.HEADER.format, wire.ALIVE)
    assert (faulty_ssh.NONCE_SIZE, faulty_ssh.BEGUN) == (bundle.NONCE_SIZE, loader.BEGUN)
    kinds = {way: [piece[0] for piece in scene.pieces[way][START[way] :]] for way in (UP, DOWN)}
    assert kinds[UP] == [wire.REQUEST, wire.TAKE, wire.SCAN, wire.TABLE]
    assert kinds[DOWN][:5] == [wire.HELLO, wire.READY, wire.TAKEN, wire.SOURCE, wire.WANT]
    assert kinds[DOWN][-2:] == [wire.TOTALS, wire.END]
    assert {wire.DATA, wire.ZERO, wire.PROGRESS} <= set(kinds[DOWN])


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_cut_anywhere_fails_the_run(trials: Trials, impatient: None, way: str) -> None:
    ends = trials.ends([(faulty_ssh.CUT, point) for point in trials.scene.behind(way)])
    assert {type(error) for error in ends.values()} == {TransportError}


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_garbled_byte_is_never_missed(trials: Trials, impatient: None, way: str) -> None:
    ends = trials.ends([(faulty_ssh.GARBLE, point) for point in trials.scene.bytes_of(way)])
    assert succeeded(ends) == []


@pytest.mark.parametrize("way", [UP, DOWN])
def test_a_delay_is_no_fault(trials: Trials, way: str) -> None:
    ends = trials.ends([(faulty_ssh.DELAY, point) for point in trials.scene.boundaries(way)])
    assert set(ends.values()) == {None}


@pytest.mark.parametrize("way", [UP, DOWN])
def test_what_comes_twice_never_gets_into_a_generation(trials: Trials, impatient: None, way: str) -> None:
    """Behind the last order the agent may be done before it looks at what follows; so may the server behind END."""
    kinds = (faulty_ssh.REPEAT_BYTE, faulty_ssh.REPEAT_PIECE)
    points = trials.scene.boundaries(way)[1:]
    ends = trials.ends([(kind, point) for kind in kinds for point in points])
    assert {point for _, point in succeeded(ends)} <= {points[-1]}


@pytest.mark.parametrize(
    ("way", "kinds"),
    [
        (UP, (faulty_ssh.STALL, faulty_ssh.STALL_BOTH, faulty_ssh.CLOSE_SERVER_SIDE, faulty_ssh.CLOSE_HOST_SIDE)),
        (DOWN, (faulty_ssh.STALL, faulty_ssh.CLOSE_SERVER_SIDE, faulty_ssh.CLOSE_HOST_SIDE)),
    ],
    ids=[UP, DOWN],
)
def test_a_connection_that_is_half_dead_is_given_up(
    trials: Trials, impatient: None, way: str, kinds: tuple[str, ...]
) -> None:
    """Behind the last byte of a direction nothing is missing, and the run may be done."""
    points = trials.scene.boundaries(way)
    ends = trials.ends([(kind, point) for kind in kinds for point in points])
    assert {point for _, point in succeeded(ends)} <= {points[-1]}


def test_both_directions_blocked_with_either_side_stuck_in_a_write(
    scene: Scene, mark: str, tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One point comes while the agent sends data, one while the server sends its table: more than fits in between."""
    monkeypatch.setattr(child, "PIPE_SIZE", 4096)
    (tmp_path / "large").mkdir()
    large = Scene(tmp_path / "large", [os.urandom(LARGE_SIZE)], os.urandom(LARGE_SIZE))
    assert sum(map(len, large.pieces[UP][START[UP] :])) > wire.TABLE_WINDOW
    kinds = [piece[0] for piece in large.pieces[DOWN][START[DOWN] :]]
    agent = Point(DOWN, START[DOWN] + kinds.index(wire.DATA), BEGIN, 1)
    server = Point(UP, len(large.pieces[UP]) - 12, BEGIN, 1)
    (tmp_path / "runs").mkdir()
    ends = Trials(large, mark, tmp_path / "runs").ends([(faulty_ssh.STALL_BOTH, point) for point in (agent, server)])
    assert succeeded(ends) == []


def test_a_start_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe is as small as the system makes those of a user who has too many."""
    monkeypatch.setattr(child, "PIPE_SIZE", 4096)
    with (
        child.ChildConnection(["sleep", "60"], Place(HOST, HOST)) as deaf,
        pytest.raises(TransportError, match=f"no agent began on {HOST} in time .waited for 0.2 s.: it said nothing"),
    ):
        connection.push_agent(deaf, timeout_s=0.2)
