"""Work that overlaps: several threads ahead of one consumer, in order, in bounded memory.

Shipped to the host: standard library only, Python 3.6 or newer.

Reading, hashing, (de)compressing and writing release the interpreter's lock for nearly all of their time, so threads
do overlap. This is the only place that starts threads for such work.
"""

import _thread
import mmap
import os
import sys
from collections import deque
from functools import partial
from typing import Callable, Deque, Generator, Generic, Iterable, Iterator, List, Optional, TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

_LEAD = 64

#: More threads than this do not help: beyond it the consumer is what holds a run back.
MAX_WORKERS = 8


def worker_count() -> int:
    """Return how many worker threads to use: one for each CPU that this process may run on, 2 to `MAX_WORKERS`."""
    return min(max(len(os.sched_getaffinity(0)), 2), MAX_WORKERS)


def in_order(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: Optional[int] = None,
    ahead: Optional[int] = None,
) -> Iterator[Result]:
    """Yield ``work(item)`` for each of `items`, in order, computed by `workers` threads up to `ahead` items ahead.

    By default there are `worker_count` threads, and one item more under way than threads, so that none has to wait.
    `items` is drawn from in the caller's thread, and only as far as `ahead` results beyond the one that the caller
    has taken: memory stays bounded. What `work` or `items` raises is raised here, at its place in the order. Work that
    was begun is waited for when the caller stops early, which must be by ``close`` or by dropping the last reference:
    in a cycle that is left to the garbage collector, the wait could meet a lock that the collector interrupted.
    """
    threads = worker_count() if workers is None else workers
    limit = threads + 1 if ahead is None else ahead
    pending: "Deque[Task[Result]]" = deque()
    crew = Crew()
    try:
        crew.start(threads)
        for item in items:
            pending.append(crew.give(partial(work, item)))
            while len(pending) > limit or (pending and pending[0].is_done()):
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        crew.forget()
        crew.dismiss()
        crew.wait()


def ahead(items: Iterator[Item], count: int) -> "Generator[Item, None, None]":
    """Yield `items` as they are, which its own thread draws, up to `count` ahead.

    What they raise is raised here, at its place. When the caller stops early the thread is not waited for: it may be in
    a read, and closes `items` and ends after that.
    """
    end = object()
    crew = Crew()
    try:
        crew.start(1)
        pending = deque(crew.give(lambda: next(items, end)) for _ in range(count))
        while True:
            item = pending.popleft().result()
            if item is end:
                return
            pending.append(crew.give(lambda: next(items, end)))
            yield cast(Item, item)
    finally:
        crew.forget()
        if isinstance(items, Generator):
            crew.give(items.close)
        crew.dismiss()


class Follower(Generic[Result]):
    """Threads that do what they are given while the caller continues; at most `behind` tasks wait for them.

    Tasks are begun in order, and what they return is handed back in order. What a task raises is raised by one of the
    next calls. A context manager: without `finish`, what was not begun is not done; what was is waited for.
    """

    def __init__(self, behind: int = 4, threads: int = 1) -> None:
        self._behind = behind
        self._threads = threads
        self._crew = Crew()
        self._pending: "Deque[Task[Result]]" = deque()

    def __enter__(self) -> "Follower[Result]":
        try:
            self._crew.start(self._threads)
        except BaseException:
            self._crew.dismiss()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._crew.forget()
        self._crew.dismiss()
        self._crew.wait()

    def give(self, work: Callable[[], Result]) -> List[Result]:
        """Let a thread do `work` when it comes to it; waits while too much is waiting, and returns what is done."""
        done = self._take_until(self._behind - 1)
        self._pending.append(self._crew.give(work))
        return done

    def finish(self) -> List[Result]:
        """Wait until everything is done; return what was not handed back yet."""
        return self._take_until(0)

    def _take_until(self, left: int) -> List[Result]:
        done: "List[Result]" = []
        while len(self._pending) > left or (self._pending and self._pending[0].is_done()):
            done.append(self._pending.popleft().result())
        return done


class Task(Generic[Result]):
    """Something that a thread does once."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        # set below, not appended to: that takes no memory, of which there may be none
        self._result: Optional[Result] = None
        self._error: Optional[BaseException] = None
        self._undone = _thread.allocate_lock()
        self._undone.acquire()

    def do(self) -> None:
        """Do it; never raises."""
        work = self._work
        del self._work  # what it holds may be large
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001  # raised again in `result`, for whoever wants to know
            self._error = error
        self._undone.release()

    def is_done(self) -> bool:
        """Tell whether `result` would not wait."""
        return not self._undone.locked()

    def result(self) -> Result:
        """Wait, and return or raise what came of it, once."""
        self._undone.acquire()
        result, self._result = self._result, None
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return cast(Result, result)


class Crew:
    """Threads that do tasks, in the order in which these were given.

    A signal's exception in the caller's thread can leave a lock of `concurrent.futures` or `threading` taken,
    if it arises in their Python code just after the taking: the threads then never end, nor does who waits for them.
    The interpreter's own locks are taken and released in one step, and `deque` needs none.
    """

    def __init__(self) -> None:
        self._tasks: "Deque[Task[object]]" = deque()
        self._dismissed = False
        # taken while there is nothing to do
        self._gate = _thread.allocate_lock()
        self._gate.acquire()
        self._at_work: List[_thread.LockType] = []

    def start(self, threads: int) -> None:
        """Start as many threads; if that fails or is interrupted, `dismiss` ends those that were started."""
        for _ in range(threads):
            at_work = _thread.allocate_lock()
            at_work.acquire()
            _thread.start_new_thread(self._run, (at_work,))
            self._at_work.append(at_work)

    def give(self, work: Callable[[], Result]) -> "Task[Result]":
        """Let a thread do `work`; if they were dismissed, it is done here, if need be."""
        task = Task(work)
        self._tasks.append(cast("Task[object]", task))
        self._open()
        if self._dismissed:
            self._do_next()
        return task

    def forget(self) -> None:
        """Drop what was given and not begun; nobody may wait for it."""
        self._tasks.clear()

    def dismiss(self) -> None:
        """Let the threads end when there is nothing more to do."""
        self._dismissed = True
        self._open()

    def wait(self) -> None:
        """Wait until the threads are done."""
        for at_work in self._at_work:
            at_work.acquire()

    def _open(self) -> None:
        try:
            self._gate.release()
        except RuntimeError:
            pass  # it is open

    def _run(self, at_work: _thread.LockType) -> None:
        while self._do_next():
            pass
        at_work.release()

    def _do_next(self) -> bool:
        """Do what is next; False when there is nothing more to come."""
        self._gate.acquire()
        dismissed = self._dismissed
        try:
            task = self._tasks.popleft()
        except IndexError:  # opened once more than there was something to do
            task = None
        if dismissed or self._tasks:
            self._open()
        if task is not None:
            task.do()
        return task is not None or not dismissed


def switch_quickly() -> None:
    """Let a thread that comes back from its work wait no longer than 0.5 ms for the interpreter.

    By default it waits 5 ms before it asks another to let go: about as long as a piece of work takes.
    """
    sys.setswitchinterval(0.0005)


class BufferPool:
    """Buffers of one size, `size` in bytes, that are used again and again.

    A fresh buffer costs a page fault for every 4 KiB that is read into it, which measures as more than the reading.
    `list.append` and `list.pop` are atomic in CPython, so threads need no lock here.

    Buffers begin 64 bytes after the beginning of a page. Processors copy four times slower to an address that is 1 to
    31 bytes above the one they copy from, modulo 4096 (measured on EPYC, see `docs/benchmarks.md`): the page cache
    begins at pages, malloc(3) puts large buffers 16 bytes after one, and a pipe what follows a frame's header 24 bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: List[memoryview] = []

    def get(self) -> memoryview:
        """Return a buffer of `size` bytes with arbitrary content."""
        try:
            return self._free.pop()
        except IndexError:
            memory = mmap.mmap(-1, _LEAD + self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            return memoryview(memory)[_LEAD : _LEAD + self.size]

    def give_back(self, buffer: memoryview) -> None:
        """Take a buffer back; the caller keeps no view of it."""
        self._free.append(buffer)
