"""Backups of the guest's volumes by the real command, and what they are held against."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import commands
from tests.lab.guest import Guest
from tests.mariadb import wait_for
from tests.relay import Relay

#: How long whatever should take a moment may take, in seconds: the guest is slow, and the machine may be busy.
PATIENCE_S = 120.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Return as soon as `condition` holds."""
    wait_for(condition, "what is waited for", PATIENCE_S)


def device_digest(guest: Guest, path: str) -> str:
    """Return the SHA-256 of what a device of the guest holds."""
    return guest.output(f"sync; sha256sum < {path}", timeout_s=PATIENCE_S).split()[0]


class Hold:
    """Lets what comes from the guest through a relay pass, up to `limit` bytes, and the rest only after `go`."""

    def __init__(self, guest: Guest, limit: int) -> None:
        self._limit = limit
        self._reached, self._going = threading.Event(), threading.Event()
        self._relay = Relay(guest.port, on_bytes=self._passed)
        self._guest = guest

    def __enter__(self) -> "Hold":
        self._relay.__enter__()
        self._guest.trust(self._relay.port)
        self.port = self._relay.port
        return self

    def __exit__(self, *exception: object) -> None:
        self.go()
        self._relay.__exit__()

    def wait(self) -> None:
        """Wait until the limit is reached."""
        assert self._reached.wait(PATIENCE_S), "the run did not get that far"

    def go(self) -> None:
        """Let everything pass."""
        self._going.set()

    def _passed(self, _up: int, down: int) -> None:
        if down >= self._limit:
            self._reached.set()
            self._going.wait(PATIENCE_S)


@dataclass
class VolumeChain:
    """A chain of one volume of the guest: `name` is its NAME, `path` the volume's."""

    guest: Guest
    name: Path
    path: str

    def words(self, *words: str, port: int | None = None) -> list[str]:
        """Return the command line of a run."""
        source = self.guest.url(self.path, port)
        return ["blockdiff", "backup", str(self.name), source, "--lvm", "--json", *self.guest.arguments, *words]

    def backup(self, *words: str) -> dict[str, object]:
        """Add a generation, without a word of complaint; return the summary."""
        summary = json.loads(commands.done(*self.words(*words)))
        assert isinstance(summary, dict)
        return summary

    def fails(self, *words: str, status: int = 1) -> str:
        """Run a backup that must fail and leave the chain as it was; return what it says."""
        before = self.files()
        result = commands.run(*self.words(*words))
        assert (result.returncode, result.stdout) == (status, b""), result
        assert self.files() == before
        return result.stderr.decode()

    @contextmanager
    def slowly(self, limit: int, *words: str) -> "Iterator[tuple[Hold, Callable[[], tuple[int, str, str]]]]":
        """Yield a run that stops once `limit` bytes came from the guest, and what waits for its end.

        That returns the exit status and what was printed on standard output and error.
        """
        with Hold(self.guest, limit) as hold, commands.started(*self.words(*words, port=hold.port)) as process:

            def end() -> tuple[int, str, str]:
                hold.go()
                out, err = process.communicate(timeout=PATIENCE_S)
                return process.returncode, out.decode(), err.decode()

            hold.wait()
            assert process.poll() is None
            yield hold, end

    def digest(self, number: int) -> str:
        """Restore a generation, and return the SHA-256 of it."""
        target = self.name.parent.parent / f"restored-{number}"
        commands.done("blockdiff", "restore", f"{self.name}@{number}", target)
        try:
            return hashlib.sha256(target.read_bytes()).hexdigest()
        finally:
            target.unlink()

    def verify(self) -> None:
        """Prove that all generations restore."""
        assert commands.done("blockdiff", "verify", self.name) == b""

    def files(self) -> dict[str, bytes]:
        """Return the files of the chain, but for its lock."""
        found = self.name.parent.glob(f"{self.name.name}.*")
        return {path.name: path.read_bytes() for path in found}


def part(fields: dict[str, object], name: str) -> dict[str, object]:
    """Return an object in a summary."""
    value = fields[name]
    assert isinstance(value, dict)
    return value
