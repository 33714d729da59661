"""A progress bar for whoever watches a run; imported only where there is a terminal."""

from types import TracebackType

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as RichProgress

from blockdiff.progress import Progress


class Bar(Progress):
    """Shows bytes read, rate, time left, and what came over the wire, on standard error. A context manager."""

    def __init__(self, what: str) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._what = what
        self._task: TaskID | None = None

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, total: int | None) -> None:
        """See `progress.Progress`."""
        self._task = self._bar.add_task(self._what, total=total, note="")

    def update(self, offset: int, received: int) -> None:
        """See `progress.Progress`."""
        if self._task is not None:
            self._bar.update(self._task, completed=offset, note=f"{decimal(received)} sent")

    def advance(self, count: int) -> None:
        """See `progress.Progress`."""
        if self._task is not None:
            self._bar.advance(self._task, count)
