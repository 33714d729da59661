"""How long-running work reports its progress. This class ignores the reports."""

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Receives the progress of a run, from the thread that runs it."""

    def begin(self, total: int | None) -> None:
        """The work has this many bytes in total; None if that is not known."""

    def update(self, offset: int, received: int) -> None:
        """Everything before `offset` was examined, and `received` bytes were received from the host."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hide the progress while something else is printed."""
        yield

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
