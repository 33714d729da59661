"""One sitting: every tool in every phase, in turn, A B A B, over the same images."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench import measure
from bench.measure import CommandError, Series
from bench.reserve import Reserve
from bench.tools import FULL, INCREMENTAL, RESTORE, VERIFY, Tool
from bench.workload import Workload

#: Generations after the full one when an image is restored.
INCREMENTALS = 10

#: By phase, by the name of a tool.
Results = dict[str, dict[str, Series]]


class Contest:
    """Runs `tools` over `workload` in `directory`, `rounds` times each; `results` holds what was measured.

    Whatever a tool needs from the phase before (a store with so many generations) is copied afresh for each round from
    `aside`, a directory on a disk, and not measured.
    """

    def __init__(
        self, workload: Workload, tools: Sequence[Tool], rounds: int, directory: Path, aside: Path, reserve: Reserve
    ) -> None:
        self._workload = workload
        self._tools = tools
        self._rounds = rounds
        self._directory = directory
        self._aside = aside
        self._reserve = reserve
        self.results: Results = {phase: {} for phase in (FULL, INCREMENTAL, RESTORE, VERIFY)}

    def run(self) -> None:
        """Run all phases; raises `CommandError`."""
        self._phase(FULL, self._tools, 1)
        chains = [tool for tool in self._tools if INCREMENTAL in tool.commands]
        for tool in self._tools:
            if tool not in chains:
                shutil.rmtree(self._store(tool))  # memory is short
        self._workload.change()
        self._phase(INCREMENTAL, chains, 2)
        for number in range(3, INCREMENTALS + 2):
            self._workload.change()
            for tool in chains:
                self._measure(tool, INCREMENTAL, number, None)
        for phase in (RESTORE, VERIFY):
            self._phase(phase, chains, INCREMENTALS + 1)

    def _phase(self, phase: str, tools: Sequence[Tool], number: int) -> None:
        for tool in tools:
            self.results[phase][tool.name] = Series()
        for round_number in range(1, self._rounds + 1):
            for tool in tools:
                self._round(phase, tool, number, last=round_number == self._rounds)

    def _round(self, phase: str, tool: Tool, number: int, *, last: bool) -> None:
        """Run one phase of one tool once; the store of the last round is what the next phase begins with."""
        series, store, before = self.results[phase][tool.name], self._store(tool), self._aside / tool.name
        if phase == FULL:
            shutil.rmtree(store, ignore_errors=True)
            store.mkdir()
            measure.run(tool.preparation(store), tool.environment(store), self._directory)
        elif phase == INCREMENTAL:
            if before.exists():
                shutil.rmtree(store)
                shutil.copytree(before, store, symlinks=True)
            else:
                shutil.copytree(store, before, symlinks=True)
            _write_out(before)
        stored = measure.size_of(store)
        cost = self._measure(tool, phase, number, self._reserve)
        series.costs.append(cost)
        series.stored = measure.size_of(store) - stored
        print(f"{phase:12} {tool.name:24} {cost.wall_s:7.2f} s {cost.cpu_s:7.2f} CPU s", file=sys.stderr, flush=True)
        if last and before.exists():
            shutil.rmtree(before)

    def _measure(self, tool: Tool, phase: str, number: int, reserve: Reserve | None) -> measure.Cost:
        store, target = self._store(tool), self._directory / "restored"
        command = tool.command(phase, image=self._workload.path, store=store, number=number, target=target)
        try:
            cost = measure.run(command, tool.environment(store), self._directory, reserve)
            if phase == RESTORE:
                self._check(tool, target)
        finally:
            target.unlink(missing_ok=True)
        return cost

    def _check(self, tool: Tool, target: Path) -> None:
        """Raise `CommandError` unless the image that was restored is the one that was backed up."""
        with self._workload.path.open("rb") as image, target.open("rb") as restored:
            while piece := image.read(1 << 20):
                if restored.read(len(piece)) != piece:
                    raise CommandError(f"{tool.name} restored another image")

    def _store(self, tool: Tool) -> Path:
        return self._directory / f"store-{tool.name.replace(' ', '_')}"


def _write_out(directory: Path) -> None:
    """See to it that nothing of the files below is left to be written, or in the memory that is measured next."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
