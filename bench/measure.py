"""What a command costs: wall time, CPU time and memory."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.reserve import Reserve

#: No command of a benchmark may take longer, in seconds.
TIMEOUT_S = 3600

_LAUNCHER = Path(__file__).with_name("launcher.py")


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


def run(
    command: "str | Sequence[str]", env: Mapping[str, str], directory: Path, reserve: Reserve | None = None
) -> Cost:
    """Run a command, a string by the shell with ``pipefail``, and return what it cost; raises `CommandError`.

    With a `reserve` it finds that much memory at hand.
    """
    words = ["bash", "-o", "pipefail", "-c", command] if isinstance(command, str) else list(command)
    result = directory / "cost"
    # as after an installation: modules are compiled once, not in every run
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    launched = [sys.executable, "-I", str(_LAUNCHER), str(result), "timeout", str(TIMEOUT_S), *words]
    if reserve is not None:
        reserve.take()
        reserve.lend()
    done = subprocess.run(
        launched, env={**inherited, **env}, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise CommandError(f"{command}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
    return Cost(**json.loads(result.read_text()))


def size_of(path: Path) -> int:
    """Return the bytes of all files at or below `path`."""
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file() and not each.is_symlink())
