"""Work that overlaps: several threads work ahead of one consumer, in order and in bounded memory.

Shipped to the host: standard library only, Python 3.6 or newer.

Reading, hashing, (de)compressing and writing release the interpreter's lock for nearly all of their time, so threads
really overlap. Only this module starts threads for such work.
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

#: More threads than this do not help: the consumer is then the bottleneck of a run.
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

    By default there are `worker_count` threads, and one item more in progress than threads, so that no thread waits.
    The caller's thread iterates `items`, at most `ahead` items beyond the result that the caller has taken: so memory
    is bounded. An exception of `work` or `items` is raised here, at its place in the order. If the caller stops early,
    this waits for the work that has begun. The caller must then call ``close`` or drop the last reference. In a
    reference cycle, the garbage collector would run that wait, perhaps while the interrupted code holds a lock that the
    wait needs.
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
    """Yield `items` unchanged; a thread iterates them, up to `count` items ahead.

    An exception of `items` is raised here, at its place. If the caller stops early, this does not wait for the thread,
    which may be in a read: after the read it closes `items` and ends.
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
    """Threads that do tasks while the caller continues; at most `behind` tasks are unfinished or not handed back.

    Tasks begin in order, and their results are returned in order. An exception of a task is raised by one of the next
    calls. This is a context manager: if it ends without `finish`, tasks that have not begun are dropped, and it waits
    for those that have.
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
        """Give `work` to the threads; waits while too many tasks are unfinished, and returns the ready results."""
        done = self._take_until(self._behind - 1)
        self._pending.append(self._crew.give(work))
        return done

    def finish(self) -> List[Result]:
        """Wait until all tasks are done; return the results that were not returned yet."""
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
        # attributes that are set below, not lists to append to: setting needs no memory, and there may be none left
        self._result: Optional[Result] = None
        self._error: Optional[BaseException] = None
        self._undone = _thread.allocate_lock()
        self._undone.acquire()

    def do(self) -> None:
        """Do the task; never raises."""
        work = self._work
        del self._work  # the objects that it refers to may be large
        try:
            self._result = work()
        except BaseException as error:  # noqa: BLE001  # `result` raises it again
            self._error = error
        self._undone.release()

    def is_done(self) -> bool:
        """Return whether the task is done, so that `result` would not wait."""
        return not self._undone.locked()

    def result(self) -> Result:
        """Wait until the task is done, then return its result or raise its exception; to be called once."""
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
    """Threads that do tasks, in the order in which the tasks were given.

    This uses neither `concurrent.futures` nor `threading`: if a signal's exception is raised in their Python code just
    after that code has taken a lock, the lock is never released. Then the threads never end, and a caller that waits
    for them never continues. The interpreter's own locks are taken and released in one step, and `deque` needs none.
    """

    def __init__(self) -> None:
        self._tasks: "Deque[Task[object]]" = deque()
        self._dismissed = False
        # locked while there is nothing to do
        self._gate = _thread.allocate_lock()
        self._gate.acquire()
        self._at_work: List[_thread.LockType] = []

    def start(self, threads: int) -> None:
        """Start this many threads; if that fails or is interrupted, `dismiss` ends those that were started."""
        for _ in range(threads):
            at_work = _thread.allocate_lock()
            at_work.acquire()
            _thread.start_new_thread(self._run, (at_work,))
            self._at_work.append(at_work)

    def give(self, work: Callable[[], Result]) -> "Task[Result]":
        """Let a thread do `work`; after `dismiss`, this thread does it if no other thread has taken it."""
        task = Task(work)
        self._tasks.append(cast("Task[object]", task))
        self._open()
        if self._dismissed:
            self._do_next()
        return task

    def forget(self) -> None:
        """Drop the tasks that have not begun; nothing may wait for them."""
        self._tasks.clear()

    def dismiss(self) -> None:
        """Let the threads end when all tasks are done."""
        self._dismissed = True
        self._open()

    def wait(self) -> None:
        """Wait until the threads have ended."""
        for at_work in self._at_work:
            at_work.acquire()

    def _open(self) -> None:
        try:
            self._gate.release()
        except RuntimeError:
            pass  # it is open already

    def _run(self, at_work: _thread.LockType) -> None:
        while self._do_next():
            pass
        at_work.release()

    def _do_next(self) -> bool:
        """Do the next task; return False if there is none and no more can come."""
        self._gate.acquire()
        dismissed = self._dismissed
        try:
            task = self._tasks.popleft()
        except IndexError:  # the gate was opened once more than there were tasks
            task = None
        if dismissed or self._tasks:
            self._open()
        if task is not None:
            task.do()
        return task is not None or not dismissed


def switch_quickly() -> None:
    """Let a thread that needs the interpreter's lock again wait no longer than 0.5 ms for it.

    By default it waits 5 ms before it asks the other thread to release it: about as long as one task takes.
    """
    sys.setswitchinterval(0.0005)


class BufferPool:
    """Buffers of `size` bytes that are used again and again.

    A new buffer costs a page fault for every 4 KiB that is read into it; as measured, that takes longer than the
    reading. `list.append` and `list.pop` are atomic in CPython, so threads need no lock here.

    Buffers begin 64 bytes after the beginning of a page. Processors copy four times slower to an address that is 1 to
    31 bytes above the one they copy from, modulo 4096 (measured on EPYC, see `docs/benchmarks.md`). Data in the page
    cache begins at a page; malloc(3) puts large buffers 16 bytes after the beginning of a page; and in a pipe, the
    payload of a frame begins after the header of 24 bytes.
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
        """Take a buffer back; the caller must not keep a view of it."""
        self._free.append(buffer)
