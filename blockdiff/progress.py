"""How long work reports how far it is. This one reports to nobody."""

from collections.abc import Iterator
from contextlib import contextmanager


class Progress:
    """Told how a run goes, by the thread that runs it."""

    def begin(self, total: int | None) -> None:
        """The work has this many bytes in all, None if nobody knows."""

    def update(self, offset: int, received: int) -> None:
        """Everything below `offset` was examined, and `received` bytes have come from the host."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Make room for what is printed in between."""
        yield

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
