"""`python -m bench`: measure, and write ``docs/benchmarks.md``."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from bench import extremes, report, thin, tools
from bench.contest import Contest, Results
from bench.report import Target
from bench.reserve import Reserve
from bench.tools import FULL, INCREMENTAL, RESTORE, VERIFY
from bench.workload import Workload
from tests.sshd import Sshd

_PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_BEGIN = "<!-- `make bench` writes what follows -->\n"

_LOCAL, _ZSTD, _XXH3, _MD5, _SSH, _CAT = (
    *("blockdiff", "blockdiff zstd", "blockdiff xxh3", "blockdiff md5", "blockdiff ssh"),
    "ssh cat, pigz -1",
)


@click.command()
@click.argument("peers", nargs=-1)
@click.option("--size", default=2048, show_default=True, help="MiB of the image.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--only", "wanted", multiple=True, help="Only tools whose name has this in it.")
@click.option("--directory", type=click.Path(path_type=Path), help="Where everything lies. Default /dev/shm.")
@click.option("--write/--no-write", default=True, show_default=True, help="Change docs/benchmarks.md.")
def main(
    peers: tuple[str, ...], size: int, rounds: int, wanted: tuple[str, ...], directory: Path | None, write: bool
) -> None:
    """Measure blockdiff and its peers; PEERS are further ones, NAME=COMMAND with {image} and {store}."""
    with (
        tempfile.TemporaryDirectory(prefix="blockdiff-bench-", dir=directory or Path("/dev/shm")) as scratch,
        tempfile.TemporaryDirectory(prefix="blockdiff-bench-", dir="/var/tmp") as aside,
    ):
        place = Path(scratch)
        (place / "sshd").mkdir()
        with Sshd(place / "sshd") as sshd, Reserve((size << 20) * 5 // 4) as reserve:
            workload = Workload(place / "image", size << 20)
            workload.make()
            chosen = [tool for tool in _tools(sshd, peers) if not wanted or any(word in tool.name for word in wanted)]
            contest = Contest(workload, chosen, rounds, place, Path(aside), reserve)
            contest.run()
            others = [] if wanted else extremes.measured(workload, sshd, place, reserve)
        others += [] if wanted else thin.measured(place)
    text = report.page(contest.results, [*_targets(contest.results), *others], chosen, size << 20, rounds)
    click.echo(text)
    if write and not wanted:
        before = _PAGE.read_text().partition(_BEGIN)[0]
        _PAGE.write_text(f"{before}{_BEGIN}\n{text}")


def _tools(sshd: Sshd, peers: tuple[str, ...]) -> list[tools.Tool]:
    remote = sshd.url("{image}")
    ssh = " ".join(["ssh", "-o", "BatchMode=yes", *(f"-o {option}" for option in sshd.options), f"-p {sshd.port}"])
    return [
        tools.blockdiff(_LOCAL),
        tools.blockdiff(_ZSTD, "--compression zstd"),
        tools.blockdiff(_XXH3, "--digest xxh3"),
        tools.blockdiff(_MD5, "--digest md5 --format 1"),
        tools.blockdiff(_SSH, " ".join(sshd.arguments), remote),
        tools.Tool(_CAT, {FULL: f"{ssh} {sshd.login} cat {{image}} | pigz -1 > {{store}}/image.gz"}),
        *tools.peers(),
        *map(tools.named, peers),
        tools.Tool("dd bs=1M", {FULL: "dd if={image} of=/dev/null bs=1M status=none"}),
    ]


def _targets(results: Results) -> list[Target]:
    """Return the targets, as far as what they compare was measured."""

    def wall(phase: str, name: str) -> float:
        return results[phase][name].wall_s

    def peak(phase: str) -> float:
        return max(results[phase][name].peak for name in (_LOCAL, _ZSTD, _XXH3, _MD5, _SSH)) / (1 << 20)

    def stored(name: str) -> float:
        return float(results[FULL][name].stored or 0)

    makers: tuple[Callable[[], tuple[str, float, float]], ...] = (
        lambda: ("full, beside borg", wall(FULL, _LOCAL) / wall(FULL, "borg"), 0.6),
        lambda: ("full, beside gzip -6", wall(FULL, _LOCAL) / wall(FULL, "gzip -6"), 1 / 12),
        lambda: ("full, stored beside gzip -6", stored(_LOCAL) / stored("gzip -6"), 1.03),
        lambda: ("full, zstd, beside borg", wall(FULL, _ZSTD) / wall(FULL, "borg"), 0.5),
        lambda: ("full, zstd, stored beside borg", stored(_ZSTD) / stored("borg"), 1.0),
        lambda: ("incremental, beside borg", wall(INCREMENTAL, _LOCAL) / wall(INCREMENTAL, "borg"), 0.6),
        lambda: ("incremental, xxh3, beside borg", wall(INCREMENTAL, _XXH3) / wall(INCREMENTAL, "borg"), 0.3),
        lambda: ("incremental, xxh3, beside dd bs=1M", wall(INCREMENTAL, _XXH3) / wall(FULL, "dd bs=1M"), 2.0),
        lambda: ("incremental, md5, beside borg", wall(INCREMENTAL, _MD5) / wall(INCREMENTAL, "borg"), 1.0),
        lambda: ("restore of 1 + 10, beside borg", wall(RESTORE, _LOCAL) / wall(RESTORE, "borg"), 0.5),
        lambda: ("restore of 1 + 10, beside restic", wall(RESTORE, _LOCAL) / wall(RESTORE, "restic"), 0.35),
        lambda: ("verify of all, beside restore of one", wall(VERIFY, _LOCAL) / wall(RESTORE, _LOCAL), 1.0),
        lambda: ("full over SSH, beside local", wall(FULL, _SSH) / wall(FULL, _LOCAL), 1.8),
        lambda: ("full over SSH, beside ssh cat, pigz -1", wall(FULL, _SSH) / wall(FULL, _CAT), 1.0),
        lambda: ("memory of the largest process, full, MiB", peak(FULL), 200),
        lambda: ("memory of the largest process, restore, MiB", peak(RESTORE), 200),
        lambda: (
            "incremental over SSH, seconds beyond 1.3 local",
            wall(INCREMENTAL, _SSH) - 1.3 * wall(INCREMENTAL, _LOCAL),
            1.0,
        ),
    )
    found = []
    for make in makers:
        try:
            found.append(Target(*make()))
        except KeyError:
            continue  # a peer that is not installed, or was not asked for
    return found


if __name__ == "__main__":
    main()
