"""Work that overlaps: in order, a bounded number ahead, errors at their place, and no thread left behind."""

import _thread
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator

import pytest

from blockdiff.shared import pipeline

TIMEOUT_S = 30.0


@pytest.fixture(autouse=True)
def no_thread_stays() -> Iterator[None]:
    before = _thread._count()
    yield
    gc.collect()
    deadline = time.monotonic() + TIMEOUT_S
    while _thread._count() > before and time.monotonic() < deadline:
        time.sleep(0.001)  # the last instructions of a thread
    assert _thread._count() <= before


def generator(work: Callable[[int], int], items: Iterable[int], workers: int, ahead: int) -> Generator[int, None, None]:
    """Return the same as `pipeline.in_order`, as something that can be closed early."""
    results = pipeline.in_order(work, items, workers, ahead)
    assert isinstance(results, Generator)
    return results


def test_results_come_in_order_though_the_work_ends_in_another() -> None:
    """The first item is done only after the second one was."""
    second_done = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert second_done.wait(TIMEOUT_S)
        elif item == 1:
            second_done.set()
        return item * 10

    assert list(pipeline.in_order(work, range(20), workers=2, ahead=3)) == [i * 10 for i in range(20)]


def test_the_work_is_done_by_several_threads_at_once() -> None:
    barrier = threading.Barrier(3)

    def work(item: int) -> int:
        return barrier.wait(TIMEOUT_S) * 0 + item

    assert list(pipeline.in_order(work, range(6), workers=3, ahead=3)) == list(range(6))


def test_items_are_drawn_in_the_callers_thread_and_only_so_far_ahead() -> None:
    """However slow the consumer and however quick the work."""
    drawn: list[int] = []
    threads: set[int] = set()

    def items() -> Iterator[int]:
        for i in range(50):
            drawn.append(i)
            threads.add(threading.get_ident())
            yield i

    taken = 0
    for result in pipeline.in_order(lambda item: item, items(), workers=2, ahead=4):
        assert result == taken
        taken += 1
        assert len(drawn) <= taken + 4
    assert (taken, len(drawn)) == (50, 50)
    assert threads == {threading.get_ident()}


def test_work_that_is_not_done_holds_up_no_more_than_what_is_ahead() -> None:
    """With the first item unfinished, no more than `ahead` others are begun."""
    go = threading.Event()
    begun: list[int] = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 0:
            assert go.wait(TIMEOUT_S)
        return item

    def items() -> Iterator[int]:
        for i in range(20):
            if i == 6:
                pytest.fail("drew more items than allowed while the first was unfinished")
            if i == 5:
                go.set()
            yield i

    results = generator(work, items(), workers=2, ahead=5)
    assert next(results) == 0
    assert len(begun) <= 6
    results.close()


def test_what_the_work_raises_is_raised_at_its_place() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise ValueError("item 3")
        return item

    results = pipeline.in_order(work, range(10), workers=4, ahead=5)
    assert [next(results), next(results), next(results)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    with pytest.raises(StopIteration):
        next(results)


def test_what_the_items_raise_ends_the_work() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("no more items")

    with pytest.raises(ValueError, match="no more items"):
        list(pipeline.in_order(lambda item: item, items(), workers=2, ahead=2))


def test_who_stops_early_waits_for_what_was_begun_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers may be used again afterwards: no thread writes into them any more."""
    ended: list[int] = []
    begun = threading.Event()
    go = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert begun.wait(TIMEOUT_S)
        else:
            begun.set()
            assert go.wait(TIMEOUT_S)
        ended.append(item)
        return item

    results = generator(work, range(100), workers=2, ahead=10)
    assert next(results) == 0
    wait = pipeline.Crew.wait

    def waiting(crew: pipeline.Crew) -> None:
        go.set()
        wait(crew)

    monkeypatch.setattr(pipeline.Crew, "wait", waiting)
    results.close()
    assert ended[0] == 0 and 1 in ended
    assert len(ended) <= 3


def test_no_items_give_no_results() -> None:
    assert list(pipeline.in_order(lambda item: item, list[int](), workers=2, ahead=2)) == []


def test_worker_count_is_that_of_the_cpus_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    for cpus, expected in ((1, 2), (2, 2), (5, 5), (64, pipeline.MAX_WORKERS)):
        monkeypatch.setattr("os.sched_getaffinity", lambda pid, cpus=cpus: set(range(cpus)))
        assert pipeline.worker_count() == expected


def test_buffers_are_used_again() -> None:
    pool = pipeline.BufferPool(100)
    first = pool.get()
    assert len(first) == pool.size == 100
    second = pool.get()
    assert second is not first
    pool.give_back(first)
    assert pool.get() is first


def test_what_is_drawn_ahead_comes_in_order_and_only_so_far_ahead() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            drawn.append(i)
            yield i

    found = pipeline.ahead(items(), 3)
    for expected in range(20):
        assert next(found) == expected
        assert len(drawn) <= expected + 5
    assert list(found) == []


def test_what_is_drawn_ahead_raises_at_its_place() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("two")

    found = pipeline.ahead(items(), 2)
    assert next(found) == 1
    with pytest.raises(ValueError, match="two"):
        next(found)


def test_who_stops_drawing_ahead_early_does_not_wait_and_what_is_drawn_from_is_closed() -> None:
    drawn, gate, closed = threading.Event(), threading.Event(), threading.Event()

    def items() -> Iterator[int]:
        try:
            yield 1
            drawn.set()
            gate.wait(TIMEOUT_S)
            yield 2
        finally:
            closed.set()

    found = pipeline.ahead(items(), 1)
    assert next(found) == 1
    assert drawn.wait(TIMEOUT_S)
    found.close()
    assert not closed.is_set()
    gate.set()
    assert closed.wait(TIMEOUT_S)


#: At 2000 moments, ends work under way by an exception out of a signal handler, and says so.
INTERRUPTING = """
import signal, sys
from blockdiff.shared import pipeline
from blockdiff.shared.errors import Interrupted

armed = []

def interrupt(number, frame):
    if armed:  # an interpreter with several threads may take a signal late, when its moment is over
        armed.clear()
        raise Interrupted("told to stop")

signal.signal(signal.SIGALRM, interrupt)
interrupted = 0
for moment in range(2000):
    try:
        armed.append(True)
        signal.setitimer(signal.ITIMER_REAL, 0.00002 + moment * 0.0000005)
        for result in eval(sys.argv[1]):
            pass
        armed.clear()
    except Interrupted:
        interrupted += 1
    signal.setitimer(signal.ITIMER_REAL, 0)
print(interrupted)
"""


@pytest.mark.parametrize(
    "work", ["pipeline.in_order(str, range(500))", "pipeline.ahead(iter(range(500)), 3)"], ids=["in_order", "ahead"]
)
def test_whenever_a_signal_ends_the_work_its_threads_end_too(work: str) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTING, work], capture_output=True, timeout=240)
    assert done.stderr == b""
    assert int(done.stdout) > 1000


def test_memory_that_was_freed_is_kept() -> None:
    """Large pieces are taken and freed over and over without page faults: the child counts its own."""
    count = (
        "import resource; from blockdiff.cli.memory import keep_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(50): bytes(bytearray(b'x') * (2 << 20))\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "keep_memory(); faults(); print(faults())"
    )
    shown = subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, timeout=60, check=True)
    assert int(shown.stdout) < 5000  # 50 times 2 pieces of 512 pages otherwise
