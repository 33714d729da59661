"""Runs that are stopped on their way: whatever dies when, the lock is gone soon, and the next run cleans up."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest

from tests.lab.guest import Guest
from tests.lab.scene import LOCK_WAIT_S, PATIENCE_S, Scene, Victim, kill_agent
from tests.lab.volumes import VolumeGroup
from tests.mariadb import Running, wait_for
from tests.relay import SILENCE, Relay

#: Bytes of a block of the chain.
BLOCK = 64 << 10
#: How soon a run that ends must have let go of the lock, in seconds: the guest is slow, and the database may hold on to
#: it four times as long.
AT_ONCE_S = 30.0
#: How long it may be held where the database is who ends it, in seconds.
SHORT_HOLD_S = 20


@pytest.fixture(scope="module")
def scene(guest: Guest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with (
        VolumeGroup(guest, guest.devices[2]) as group,
        Relay(guest.port) as relay,
        Scene(guest, group, relay, tmp_path_factory.mktemp("interruptions")) as scene,
    ):
        yield scene


# --- stages: each starts a run that stands there for certain


@contextmanager
def before_the_lock(scene: Scene, how: str) -> Iterator[Victim]:
    """It waits for the lock, which somebody else's lock is in the way of."""
    scene.hinder(scene.tables_locked())
    with scene.victim(*scene.words(how)) as victim:
        wait_for(lambda: _stands(victim, "Waiting for" in str(scene.sessions())), "a run that waits", PATIENCE_S)
        yield victim


@contextmanager
def within_the_lock(scene: Scene, how: str) -> Iterator[Victim]:
    """--before runs, and does not end."""
    scene.hinder(scene.held())
    with scene.victim(*scene.words(how)) as victim:
        wait_for(lambda: _stands(victim, scene.log() == ["before"]), "--before", PATIENCE_S)
        yield victim


@contextmanager
def within_lvcreate(scene: Scene, how: str) -> Iterator[Victim]:
    """`lvcreate` waits for the lock of the volume group."""
    with within_the_lock(scene, how) as victim:
        with scene.held():  # which removes the mark at the end: --before ends
            scene.hinder(scene.group_locked())
        wait_for(lambda: _stands(victim, scene.is_running("lvcreate")), "lvcreate", PATIENCE_S)
        yield victim


@contextmanager
def after_the_lock(scene: Scene, how: str) -> Iterator[Victim]:
    """The snapshot is made, the lock is gone, and nothing has come yet: the agent sends too slowly."""
    with scene.victim(*scene.words(how, "--full", "--bwlimit", "1K")) as victim:
        wait_for(lambda: _stands(victim, bool(scene.left()) and not scene.sessions()), "a snapshot", PATIENCE_S)
        assert scene.received() < BLOCK
        yield victim


@contextmanager
def while_reading(scene: Scene, how: str) -> Iterator[Victim]:
    """The first blocks have arrived."""
    with scene.victim(*scene.words(how, "--full", "--bwlimit", "1M")) as victim:
        wait_for(lambda: _stands(victim, scene.received() >= BLOCK), "the first blocks", PATIENCE_S)
        yield victim


def _stands(victim: Victim, condition: bool) -> bool:
    if not condition:
        victim.assert_runs()
    return condition


Stage = Callable[[Scene, str], AbstractContextManager[Victim]]
#: Those in which writers have to wait.
LOCKED = (within_the_lock, within_lvcreate)


# --- deeds


def cut_the_connection(scene: Scene, victim: Victim) -> None:
    scene.relay.act()


def kill_the_server(scene: Scene, victim: Victim) -> None:
    victim.process.kill()


def kill_the_agent(scene: Scene, victim: Victim) -> None:
    kill_agent(scene.guest)


Deed = Callable[[Scene, Victim], None]


def stop(scene: Scene, stage: Stage, how: str, deed: Deed, within_s: float) -> int:
    """Stop a run at a stage; `within_s` seconds later the lock is gone. Returns the run's exit status."""
    last = scene.chain.last()
    with stage(scene, how) as victim:
        writer = None
        if stage in LOCKED:
            writer = Running(scene.database, "INSERT INTO shop.aria VALUES (1)")
            writer.wait_until_it_waits()
        begun = time.monotonic()
        deed(scene, victim)
        if writer is not None:
            writer.finish()
        wait_for(lambda: not scene.sessions(), "the end of the session", PATIENCE_S)
        took_s = time.monotonic() - begun
        status = victim.ended()
        scene.lift()  # not before: nothing in the host's way keeps the server waiting
        scene.wait_until_ended(victim)
    assert took_s < within_s
    assert scene.chain.last() == last
    scene.database.assert_free()
    return status


@pytest.mark.parametrize("deed", [cut_the_connection, kill_the_server, kill_the_agent])
@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (before_the_lock, "ssh"),
        (before_the_lock, "tcp"),
        (within_the_lock, "ssh"),
        (within_the_lock, "tcp"),
        (within_lvcreate, "ssh"),
        (after_the_lock, "ssh"),
        (while_reading, "tcp"),
    ],
)
def test_the_lock_is_gone_and_the_next_run_removes_what_was_left(
    scene: Scene, stage: Stage, how: str, deed: Deed
) -> None:
    last = scene.chain.last()
    # over TCP a server that waits for the lock notices the end of the agent when that is over
    waits = stage is before_the_lock and how == "tcp" and deed is not kill_the_server
    status = stop(scene, stage, how, deed, LOCK_WAIT_S + AT_ONCE_S if waits else AT_ONCE_S)
    assert status == (-signal.SIGKILL if deed is kill_the_server else 1)
    leaves = deed is kill_the_agent and stage in (within_lvcreate, after_the_lock, while_reading)
    left = scene.left()
    assert len(left) == (1 if leaves else 0)
    scene.run_well(removed=left)
    scene.assert_clean(last + 1)


@pytest.mark.parametrize(
    ("stage", "how", "number"),
    [
        (before_the_lock, "ssh", signal.SIGTERM),
        (before_the_lock, "tcp", signal.SIGINT),
        (within_the_lock, "ssh", signal.SIGHUP),
        (within_the_lock, "tcp", signal.SIGTERM),
        (within_lvcreate, "tcp", signal.SIGINT),
        (after_the_lock, "tcp", signal.SIGHUP),
        (while_reading, "ssh", signal.SIGINT),
    ],
)
def test_a_run_that_is_told_to_stop_lets_go_at_once_and_leaves_nothing(
    scene: Scene, stage: Stage, how: str, number: signal.Signals
) -> None:
    last = scene.chain.last()
    status = stop(scene, stage, how, lambda _scene, victim: victim.process.send_signal(number), AT_ONCE_S)
    assert status == 128 + number
    scene.assert_clean(last)


@pytest.mark.parametrize("how", ["ssh", "tcp"])
def test_the_database_itself_ends_the_lock_where_nothing_passes_any_more(scene: Scene, how: str) -> None:
    last = scene.chain.last()
    scene.hinder(scene.held())
    with ExitStack() as stack:
        wires = [stack.enter_context(Relay(port, act=SILENCE)) for port in (scene.guest.port, scene.database.port)]
        scene.guest.trust(wires[0].port)
        words = scene.words(how, "--full", ports=(wires[0].port, wires[1].port))
        with scene.victim(*words, max_hold_s=SHORT_HOLD_S) as victim:
            wait_for(lambda: _stands(victim, scene.log() == ["before"]), "--before", PATIENCE_S)
            writer = Running(scene.database, "INSERT INTO shop.aria VALUES (1)")
            writer.wait_until_it_waits()
            begun = time.monotonic()
            for wire in wires:
                wire.act()
            writer.finish(SHORT_HOLD_S + AT_ONCE_S)
            assert time.monotonic() - begun < SHORT_HOLD_S + AT_ONCE_S
            scene.lift()
            wait_for(lambda: bool(scene.left()), "the snapshot, of which only the agent knows", PATIENCE_S)
            victim.assert_runs()
            stack.close()
            assert victim.ended() == 1
            scene.wait_until_ended(victim)
    scene.assert_clean(last)


@pytest.mark.parametrize("stage", [within_the_lock, while_reading])
def test_after_a_reboot_of_the_host_the_next_run_removes_what_was_left(scene: Scene, stage: Stage) -> None:
    last = scene.chain.last()
    with stage(scene, "ssh") as victim:
        scene.reboot()
        assert victim.ended() == 1
    left = scene.left()
    assert len(left) == (1 if stage is while_reading else 0)
    scene.run_well(removed=left)
    scene.assert_clean(last + 1)
