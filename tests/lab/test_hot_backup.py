"""Backups of a database that is written to all the time: exact to the row, and writers hardly notice."""

import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import commands
from tests.lab import shop
from tests.lab.shop import Shop, field

pytestmark = pytest.mark.timeout(1800)  # half a minute for each on a machine that has nothing else to do

#: How much longer the lock may be held than the making of the snapshots takes, in seconds.
ON_TOP_S = 0.3
#: How much longer anything may take where two guests have much to do, in seconds.
BUSY_S = 20.0
#: In one of so many runs they have not.
MOST_RUNS = 8


class Made(NamedTuple):
    """A generation: NAME@N, its summary, the seconds of the whole run, and of the writers' longest statement in it."""

    name: str
    summary: "dict[str, object]"
    run_s: float
    longest_s: float

    @property
    def held_s(self) -> float:
        return float(str(field(self.summary, "quiesced")["held_s"]))

    @property
    def took_s(self) -> float:
        return float(str(field(self.summary, "snapshot")["took_s"]))

    @property
    def on_top_s(self) -> float:
        return self.held_s - self.took_s


def least_on_top_s(generations: list[Made]) -> tuple[float, float]:
    """Return the least that the lock was held for longer than needed, for each of the two ways, which take turns."""
    ssh, tcp = (min(one.on_top_s for one in generations[way::2]) for way in (0, 1))
    return ssh, tcp


@pytest.fixture(scope="module")
def generations(open_shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """A full one, by the host's own socket, slowed down, and an incremental one over TCP; the writers never stop.

    More, in turn, only where one of the ways was never gone in a moment without other work.
    """
    name = tmp_path_factory.mktemp("backup") / "shop"
    made: list[Made] = []
    with shop.written_to(open_shop) as longest_s:
        while len(made) < 2 or (max(least_on_top_s(made)) > ON_TOP_S and len(made) < MOST_RUNS):
            words = [open_shop.url()] if len(made) % 2 else ["ssh", "--bwlimit", "1M"]
            longest_s()
            begun = time.monotonic()
            summary = open_shop.backed_up(name, "--mysql", *words, env={"MYSQL_PWD": shop.PASSWORD})
            made.append(Made(f"{name}@{len(made) + 1}", summary, time.monotonic() - begun, longest_s()))
    assert [one.summary["full"] for one in made[:2]] == [True, False]
    return made


def test_the_lock_is_held_for_the_time_of_the_snapshot_and_little_more(generations: list[Made]) -> None:
    assert all(0 <= one.on_top_s <= ON_TOP_S + BUSY_S for one in generations)
    assert max(least_on_top_s(generations)) <= ON_TOP_S
    assert all(one.summary["consistency"] == "quiesced" for one in generations)


def test_writers_wait_for_the_lock_and_never_for_the_dump(generations: list[Made]) -> None:
    for one in generations:
        waited_s = float(str(field(one.summary, "quiesced")["waited_s"]))
        assert one.took_s / 2 < one.longest_s < waited_s + one.held_s + BUSY_S
    assert generations[0].longest_s < generations[0].run_s / 2, "the dump was too fast to tell: lower its limit"


@pytest.mark.parametrize("number", [1, 2])
def test_a_restored_copy_has_what_the_binlog_has_and_becomes_a_replica(
    open_shop: Shop, generations: list[Made], large_tmp_path: Path, number: int
) -> None:
    made = generations[number - 1]
    with shop.restored(open_shop, made.name, large_tmp_path) as copy:
        copy.assert_sound()
        copy.assert_of_one_moment()
        copy.assert_exactly(field(made.summary, "database"))
        with shop.written_to(open_shop):
            copy.replicate(commands.done("blockdiff", "list", made.name, "--replica-statement").decode())
            copy.wait_until_caught_up()
        copy.assert_caught_up()
