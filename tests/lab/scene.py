"""A volume with a database on it, snapshots that are none of ours, a chain, and runs that are stopped on their way."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path

from tests import chains, commands, processes
from tests.lab.guest import Guest
from tests.lab.mariadb import GuestMariaDB
from tests.lab.volumes import VolumeGroup
from tests.mariadb import execute, wait_for
from tests.relay import Relay

#: How long a run may hold the lock, and wait for it, in seconds.
MAX_HOLD_S = 120
LOCK_WAIT_S = 20
#: How long whatever should take a moment may take, in seconds: the guest is slow, and the machine may be busy.
PATIENCE_S = 60.0

_PASSWORD = "it's #1"
_GRANTS = "RELOAD, PROCESS, BINLOG MONITOR, SLAVE MONITOR"
#: Users as which runs log in to the database.
_USERS = ("root", "backup")
_PLACE = "/run/blockdiff-interrupted"
_HOLD, _LOG = f"{_PLACE}/hold", f"{_PLACE}/log"
_BEFORE = f"echo before >>{_LOG}; while [ -e {_HOLD} ]; do sleep 0.05; done"
_AFTER = f"echo after >>{_LOG}"

# one by its name alone, one that looks like ours, and one that is ours in all but its origin
_FOREIGN = """
dd if=/dev/urandom of=/dev/{vg}/other bs=1M count=8 status=none
lvcreate -q -y -s -n nightly -L 32M {vg}/data && lvcreate -q -y -s -pr -n bd_x -L 32M {vg}/data &&
lvcreate -q -y -s -pr -n bd_0123456789abcdef --addtag blockdiff --addtag blockdiff_pid_1_1_0123456789ab -L 8M {vg}/other
dd if=/dev/urandom of=/dev/{vg}/other bs=1M count=2 conv=notrunc status=none
dd if=/dev/urandom of={mount}/later bs=1M count=4 status=none; sync
"""
_SHOW_FOREIGN = """
for name in nightly bd_x bd_0123456789abcdef; do
    echo $name $(lvs --noheadings -o lv_uuid,lv_tags,lv_attr {vg}/$name) $(head -c 8M /dev/{vg}/$name | md5sum)
done
"""


def agents(guest: Guest) -> list[int]:
    """Return the pids of the agents that run in the guest, and of children of theirs that become other programs."""
    return [int(pid) for pid in guest.run("pgrep -f '[b]lockdiff-agent'", check=False).stdout.split()]


def kill_agent(guest: Guest) -> None:
    """Kill the one agent that runs in the guest: the oldest of `agents`."""
    guest.run("pkill -KILL --oldest -f '[b]lockdiff-agent'")


class Victim:
    """A run in a process of its own that is to be stopped, with all that it starts on this machine."""

    def __init__(self, words: Sequence[str]) -> None:
        self.mark = processes.new_mark()
        # whoever runs the tests may ignore signals, and hand that down
        self.process = subprocess.Popen(
            ["env", "--default-signal=HUP,INT", sys.executable, str(commands.BIN / "blockdiff"), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "MYSQL_PWD": _PASSWORD, **processes.environment(self.mark)},
        )

    def assert_runs(self) -> None:
        assert self.process.poll() is None, self.process.communicate()

    def ended(self) -> int:
        """Wait for its end; return the exit status, negative for a signal."""
        said = self.process.communicate(timeout=PATIENCE_S)[1]
        assert "Traceback" not in said, said
        return self.process.returncode

    def kill(self) -> None:
        """End whatever is left of it."""
        processes.end(self.mark)
        self.process.communicate()


class Scene:
    """Where it happens, with a first generation. `relay` leads to the guest's sshd."""

    def __init__(self, guest: Guest, group: VolumeGroup, relay: Relay, directory: Path) -> None:
        self.guest = guest
        self.group = group
        self.relay = relay
        self.chain = chains.new_chain(directory)
        self.path = group.volume("data", "64M")
        self._mount = group.mounted(self.path)
        self._hindrances = ExitStack()
        self.database = GuestMariaDB(guest, f"{self._mount}/mysql", "--log-bin=binlog", "--server-id=1")

    def __enter__(self) -> "Scene":
        self.guest.run(f"mkdir -p {_PLACE}; dd if=/dev/urandom of={self._mount}/large bs=1M count=16 status=none")
        self.database.__enter__()
        self.database.make_tables()
        self.database.run(
            f"CREATE USER backup@'%' IDENTIFIED BY '{_PASSWORD.replace(chr(39), chr(39) * 2)}'",
            f"GRANT {_GRANTS} ON *.* TO backup@'%'",
        )
        self.guest.run(_FOREIGN.format(vg=self.group.name, mount=self._mount))
        self._foreign = self._show_foreign()
        self.guest.trust(self.relay.port)
        self.run_well()
        return self

    def __exit__(self, *exception: object) -> None:
        self.database.stop()

    def reboot(self) -> None:
        """Cut the power, and bring everything back as it was."""
        self._hindrances.pop_all()  # they are gone with it
        self.guest.reboot()
        self.guest.trust(self.relay.port)
        self.group.activate()
        self.guest.run(f"mount {self.path} {self._mount}; mkdir -p {_PLACE}")
        self.database.start()

    def _show_foreign(self) -> str:
        return self.guest.output(_SHOW_FOREIGN.format(vg=self.group.name))

    def left(self) -> list[str]:
        """Return the names of the snapshots that runs have made and not removed."""
        names = self.guest.output(
            f"lvs --noheadings -o lv_name -S 'origin=data || origin=thin' {self.group.name}"
        ).split()
        return [name for name in names if name not in ("nightly", "bd_x")]

    def words(self, how: str, *more: str, ports: "tuple[int, int] | None" = None) -> list[str]:
        """Return the words of a run that locks the database over ``ssh`` or ``tcp``.

        `ports` lead to sshd and to the database; the former through the relay, and the latter straight, unless given.
        """
        port, database_port = ports or (self.relay.port, self.database.port)
        url = "ssh" if how == "ssh" else f"mysql://backup@127.0.0.1:{database_port}/"
        return [
            *("backup", self.chain.name, self.guest.url(self.path, port), *self.guest.arguments),
            *("--lvm", "--mysql", url, "--before", _BEFORE, "--after", _AFTER, "--digest", "md5", *more),
        ]

    @contextmanager
    def victim(self, *words: str, max_hold_s: int = MAX_HOLD_S) -> Iterator[Victim]:
        """Yield a run; whatever is left of it and of the hindrances is ended."""
        self.relay.reset()
        self.guest.run(f"rm -f {_LOG}")
        victim = Victim([*words, "--max-hold", str(max_hold_s), "--lock-wait", str(LOCK_WAIT_S)])
        try:
            yield victim
        finally:
            victim.kill()
            self.lift()

    def hinder(self, hindrance: AbstractContextManager[object]) -> None:
        """Put something in the way, up to `lift`."""
        self._hindrances.enter_context(hindrance)

    def lift(self) -> None:
        """Clear the way."""
        self._hindrances.close()

    @contextmanager
    def tables_locked(self) -> Iterator[None]:
        """Nobody can have the lock of the database."""
        with closing(self.database.connect()) as connection:
            execute(connection, "LOCK TABLES shop.myisam WRITE")
            yield

    @contextmanager
    def held(self) -> Iterator[None]:
        """The command of --before does not end."""
        self.guest.run(f"touch {_HOLD}")
        yield
        self.guest.run(f"rm -f {_HOLD}")

    @contextmanager
    def group_locked(self) -> Iterator[None]:
        """LVM's commands wait."""
        command = f"flock -x /run/lock/lvm/V_{self.group.name} sh -c 'echo locked; exec sleep 600'"
        with self.guest.started(command) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield

    def log(self) -> list[str]:
        """Return which of --before and --after have been started."""
        return self.guest.run(f"cat {_LOG}", check=False).stdout.split()

    def is_running(self, program: str) -> bool:
        """Return whether a program of this name runs in the guest."""
        return self.guest.run(f"pgrep -x {program}", check=False).returncode == 0

    def sessions(self) -> list[str]:
        """Return the states of the runs' database sessions."""
        rows = self.database.run("SHOW PROCESSLIST")
        return [str(row["State"]) for row in rows if row["User"] in _USERS]

    def received(self) -> int:
        """Return how many bytes of the next generation are there."""
        return sum(path.stat().st_size for path in self.chain.directory.glob(".*.tmp"))

    def assert_clean(self, last: int, *left: str) -> None:
        """The chain has `last` generations, all sound; the volumes have the snapshots `left`, and those not ours."""
        assert self.left() == list(left)
        assert self._show_foreign() == self._foreign
        assert (self.chain.last(), self.chain.bad(), self.chain.temporary()) == (last, [], [])

    def run_well(self, *more: str, removed: Sequence[str] = ()) -> dict[str, object]:
        """Run as every day; that adds a generation and removes the snapshots `removed`. Returns what it tells."""
        self.relay.reset()
        done = commands.run("blockdiff", *self.words("ssh", *more, "--json"), timeout_s=180)
        assert (done.returncode, done.stderr) == (0, b""), done
        told = dict(json.loads(done.stdout))
        assert [note for note in told["notes"] if "removed" in note] == [
            f"removed the snapshot {self.group.name}/{name}, which an earlier run left" for name in removed
        ]
        return told

    def wait_until_ended(self, victim: Victim) -> None:
        """Wait until nothing is left of a run at either end, and --after has run where --before was started."""
        processes.wait_until_gone(victim.mark, PATIENCE_S)
        wait_for(lambda: not agents(self.guest), "the end of the agent", PATIENCE_S)
        wait_for(lambda: len(self.log()) in (0, 2), "--after", PATIENCE_S)
        assert self.log() in ([], ["before", "after"])
