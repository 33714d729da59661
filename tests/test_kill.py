"""A hundred violent ends: the connection, the agent or the server dies at a random moment of a run.

Whatever dies when, the chain verifies, older generations are what they were, nothing runs on at either end, and the
next run succeeds and leaves no temporary file.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import chains, commands, processes
from tests.relay import Relay
from tests.sshd import Sshd

pytestmark = pytest.mark.torture

#: Runs for each way of dying: 5 ways over ssh, 4 over paramiko, 3 locally, 102 runs in all.
RUNS = {"ssh": 8, "paramiko": 8, "local": 10}
BLOCK = 4096
SIZE = 1 << 20


class Victim:
    """A run of `blockdiff backup` in a process of its own, with a mark for itself and whatever it starts here."""

    def __init__(self, chain: chains.SmallChain, source: str, words: list[str]) -> None:
        self.mark = processes.new_mark()
        self.process = subprocess.Popen(
            [sys.executable, str(commands.BIN / "blockdiff"), "backup", chain.name, source, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **processes.environment(self.mark)},
        )

    def wait(self) -> tuple[int, str]:
        """Return exit status and standard error once it has ended."""
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said.decode()


class Scene:
    """A chain, and how to run and disturb a backup to it over one transport. Counts how the runs ended."""

    def __init__(self, directory: Path, transport: str, sshd: Sshd, relay: Relay, seed: int) -> None:
        self.chain = chains.new_chain(directory)
        self.random = random.Random(seed)
        self.transport = transport
        self.sshd = sshd
        self.relay = relay
        self.killed = 0
        self._image = bytearray(self.random.randbytes(SIZE))
        self._write()
        # the first generation, and how long a run takes
        begun = time.monotonic()
        assert self.start().wait() == (0, "")
        self.duration_s = time.monotonic() - begun
        self._remember()

    def _write(self) -> None:
        self.chain.source.write_bytes(self._image)

    def _remember(self) -> None:
        self.chain.images[self.chain.last()] = bytes(self._image)

    def change(self) -> None:
        """Change half of the blocks: enough to be in the middle of."""
        for block in self.random.sample(range(SIZE // BLOCK), SIZE // BLOCK // 2):
            self._image[block * BLOCK : block * BLOCK + 16] = self.random.randbytes(16)
        self._write()

    def start(self) -> Victim:
        """Start a backup that is slow enough to be in the middle of; over SSH, through the relay."""
        words = ["--block-size", str(BLOCK), "--bwlimit", str(4 * SIZE)]
        if self.transport == "local":
            return Victim(self.chain, str(self.chain.source), words)
        self.relay.reset()
        words += ["--transport", self.transport, *self.sshd.arguments]
        return Victim(self.chain, self.sshd.url(self.chain.source, self.relay.port), words)

    def agents(self, victim: Victim) -> dict[int, str]:
        """Return the agents' processes: over SSH what our sshd started, locally the child of the run."""
        mark = victim.mark if self.transport == "local" else self.sshd.mark
        return {pid: line for pid, line in processes.marked(mark).items() if "blockdiff-agent" in line}

    def check(self, status: int, said: str) -> None:
        """Hold the chain against what the run said of itself, and let the next run put it in order."""
        if status != 0:
            self.killed += 1
            assert "Traceback" not in said, said
        last = self.chain.last()
        expected = max(self.chain.images)
        assert last in (expected, expected + 1), "a generation was lost"
        if last > expected:  # the run got as far as its commit
            self._remember()
        else:
            assert status != 0, "a run that said it was done left no generation"
        assert self.chain.bad() == []
        begun = time.monotonic()
        assert self.start().wait() == (0, "")
        self.duration_s = min(self.duration_s, time.monotonic() - begun)  # the machine may have been busy before
        self._remember()
        assert self.chain.temporary() == []


def wait_for_moment(scene: Scene, victim: Victim, deed: "Deed") -> None:
    """Return at a random moment of the run, or at its end: by what came over the wire, or by time."""
    by_bytes = scene.transport != "local" and scene.random.random() < 0.6
    limit = scene.random.choice([2500, 3700, scene.random.randrange(4000, SIZE // 2)])
    share = scene.random.uniform(0, 1)
    if deed is kill_the_agent and not by_bytes:
        while victim.process.poll() is None and not scene.agents(victim):
            time.sleep(0.001)
        share /= 3
    deadline = time.monotonic() + share * scene.duration_s
    while victim.process.poll() is None:
        if scene.relay.passed[1] >= limit if by_bytes else time.monotonic() >= deadline:
            return
        time.sleep(0.001)


def cut_the_connection(scene: Scene, victim: Victim) -> None:
    scene.relay.act()


def kill_ssh(scene: Scene, victim: Victim) -> None:
    for pid, line in processes.marked(victim.mark).items():
        if line.startswith("ssh "):
            _signal(pid, signal.SIGKILL)


def kill_the_agent(scene: Scene, victim: Victim) -> None:
    number = scene.random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
    for pid in scene.agents(victim):
        _signal(pid, number)


def kill_the_server(scene: Scene, victim: Victim) -> None:
    victim.process.send_signal(signal.SIGKILL)


def end_the_server(scene: Scene, victim: Victim) -> None:
    victim.process.send_signal(scene.random.choice([signal.SIGTERM, signal.SIGHUP]))


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


Deed = Callable[[Scene, Victim], None]


@pytest.mark.parametrize(
    ("transport", "deed"),
    [
        ("ssh", cut_the_connection),
        ("ssh", kill_ssh),
        ("ssh", kill_the_agent),
        ("ssh", kill_the_server),
        ("ssh", end_the_server),
        ("paramiko", cut_the_connection),
        ("paramiko", kill_the_agent),
        ("paramiko", kill_the_server),
        ("paramiko", end_the_server),
        ("local", kill_the_agent),
        ("local", kill_the_server),
        ("local", end_the_server),
    ],
)
def test_a_violent_end_leaves_a_chain_that_verifies_and_takes_the_next_run(
    tmp_path: Path, sshd: Sshd, transport: str, deed: Deed
) -> None:
    with Relay(sshd.port) as relay:
        sshd.trust(relay.port)
        scene = Scene(tmp_path, transport, sshd, relay, seed=len(transport) * 1000 + len(deed.__name__))
        for _ in range(RUNS[transport]):
            scene.change()
            victim = scene.start()
            wait_for_moment(scene, victim, deed)
            deed(scene, victim)
            status, said = victim.wait()
            processes.wait_until_gone(victim.mark)
            processes.wait_until_gone(sshd.mark)
            scene.check(status, said)
    assert scene.killed >= RUNS[transport] // 2, "too few runs were really disturbed"
    assert scene.chain.last() == max(scene.chain.images)
    for number, image in scene.chain.images.items():
        assert scene.chain.restored(number) == image, number
