"""A progress bar for a user who watches a run; imported only if there is a terminal."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from blockdiff.progress import Progress
from blockdiff.shared.blocks import shown_size


class _Done(ProgressColumn):
    """How many bytes are done, of how many."""

    def render(self, task: Task) -> Text:
        done = shown_size(int(task.completed))
        return Text(done if task.total is None else f"{done} of {shown_size(int(task.total))}")


class _Rate(ProgressColumn):
    """How many bytes are done in a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{shown_size(int(speed))}/s")


class Bar(Progress):
    """Shows bytes read, rate, time left, and what came over the wire, on standard error. A context manager."""

    def __init__(self, what: str) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Done(),
            _Rate(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,  # that would send to the terminal what is printed to a file
            redirect_stderr=False,
        )
        self._what = what
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """See `progress.Progress`."""
        self._bar.stop()
        try:
            yield
        finally:
            self._bar.start()

    def begin(self, total: int | None) -> None:
        """See `progress.Progress`."""
        self._task = self._bar.add_task(self._what, total=total, note="")

    def update(self, offset: int, received: int) -> None:
        """See `progress.Progress`."""
        if self._task is not None:
            self._bar.update(self._task, completed=offset, note=f"{shown_size(received)} sent")

    def advance(self, count: int) -> None:
        """See `progress.Progress`."""
        if self._task is not None:
            self._bar.advance(self._task, count)
