"""What was measured as a page of Markdown: each phase's table, and the targets beside what was reached."""

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

from bench.contest import Results
from bench.measure import Series
from bench.tools import Tool

_MIB = 1 << 20


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached: `reached` at most `limit` (both ratios unless `what` says otherwise)."""

    what: str
    reached: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.reached <= self.limit


def page(results: Results, targets: Sequence[Target], tools: Sequence[Tool], size: int, rounds: int) -> str:
    """Return the part of ``docs/benchmarks.md`` that a run writes."""
    lines = [
        f"Image: {size // _MIB} MiB. {rounds} rounds, in turn. Wall time (the median), its spread (longest minus",
        "shortest), CPU seconds of all processes, peak memory of the largest process, and size of what was stored.",
        "",
        f"Machine: {os.cpu_count()} CPUs ({_cpu()}), {_memory_gib()} GiB, Linux {platform.release()}.",
        f"* Python {platform.python_version()}",
        *(f"* {version}" for tool in tools if (version := tool.version())),
        "",
        "| target | limit | reached | |",
        "| --- | --- | --- | --- |",
        *(f"| {t.what} | {t.limit:.3g} | {t.reached:.3g} | {'met' if t.met else '**not met**'} |" for t in targets),
    ]
    for phase, series in results.items():
        if series:
            lines += ["", f"### {phase}", "", *_table(series)]
    return "\n".join(lines) + "\n"


def _table(by_tool: dict[str, Series]) -> list[str]:
    peers = [name for name in by_tool if not name.startswith("blockdiff")]
    head = ["tool", "wall s", "spread s", "CPU s", "peak MiB", "stored MiB", *(f"to {name}" for name in peers)]
    rows = [head, ["---"] * len(head)]
    for name, series in by_tool.items():
        stored = "" if not series.stored else f"{series.stored / _MIB:.1f}"
        figures = [f"{series.wall_s:.2f}", f"{series.spread_s:.2f}", f"{series.cpu_s:.2f}", f"{series.peak / _MIB:.0f}"]
        ratios = [f"{series.wall_s / by_tool[peer].wall_s:.2f}" for peer in peers]
        rows.append([name, *figures, stored, *ratios])
    return [f"| {' | '.join(row)} |" for row in rows]


def _cpu() -> str:
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30))
