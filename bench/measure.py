"""What a command costs: wall time, CPU time and memory."""

import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: No command of a benchmark may take longer, in seconds.
TIMEOUT_S = 3600


class CommandError(Exception):
    """A command of a benchmark failed; the figures of the run are worth nothing."""


@dataclass(frozen=True)
class Cost:
    """One run of a command: seconds by the clock, seconds of CPU of it and all its children, and peak memory.

    `peak` is in bytes, of the largest of its processes.
    """

    wall_s: float
    cpu_s: float
    peak: int


@dataclass
class Series:
    """The costs of a command over several rounds, and the bytes that it stored."""

    costs: list[Cost] = field(default_factory=list)
    stored: int | None = None

    @property
    def wall_s(self) -> float:
        """Median."""
        return statistics.median(cost.wall_s for cost in self.costs)

    @property
    def spread_s(self) -> float:
        """The longest minus the shortest."""
        walls = [cost.wall_s for cost in self.costs]
        return max(walls) - min(walls)

    @property
    def cpu_s(self) -> float:
        """Median."""
        return statistics.median(cost.cpu_s for cost in self.costs)

    @property
    def peak(self) -> int:
        """The highest."""
        return max(cost.peak for cost in self.costs)


def run(command: "str | Sequence[str]", env: Mapping[str, str], directory: Path) -> Cost:
    """Run a command, a string by the shell with ``pipefail``, and return what it cost; raises `CommandError`."""
    words = ["bash", "-o", "pipefail", "-c", command] if isinstance(command, str) else list(command)
    words = ["timeout", str(TIMEOUT_S), *words]
    with (directory / "log").open("w+b") as log:
        begun = time.monotonic()
        process = subprocess.Popen(
            words, env={**os.environ, **env}, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        try:
            _pid, status, usage = os.wait4(process.pid, 0)
            wall_s = time.monotonic() - begun
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait(30)
        if process.returncode != 0:
            log.seek(0)
            said = log.read().decode("utf-8", "replace")
            raise CommandError(f"{command}: exit status {process.returncode}\n{said}")
    return Cost(wall_s, usage.ru_utime + usage.ru_stime, usage.ru_maxrss << 10)


def size_of(path: Path) -> int:
    """Return the bytes of all files at or below `path`."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file() and not each.is_symlink())
