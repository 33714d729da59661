"""What a key may ask the agent for, where its line in ``authorized_keys`` says so; other keys may ask for anything.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

from typing import List, Optional, Sequence, Tuple

from blockdiff.errors import SourceError, printable

#: Begins the word for a database's socket, or for its port on this machine: ``mysql:/run/mysqld/mysqld.sock``.
MYSQL = "mysql:"

_HINT = "`blockdiff authorize` makes the line for that host's authorized_keys that grants it"


class Grant:
    """The sources and sockets that `words` name; None stands for everything."""

    def __init__(self, words: "Optional[Sequence[str]]" = None) -> None:
        self._words = words

    def check_sources(self, paths: "Sequence[str]", commands: "Sequence[str]") -> None:
        """Raise `SourceError` where one of the sources is not granted, or a command is to be run."""
        if self._words is None:
            return
        for path in paths:
            if path not in self._words:
                raise SourceError("this key may not read {}".format(printable(path)), _HINT)
        if commands:
            raise SourceError(
                "this key may not run commands: {}".format(printable(commands[0])), "leave out --before and --after"
            )

    def check_sockets(self, paths: "Sequence[str]", port: int) -> "Tuple[List[str], int]":
        """Return those of the sockets `paths` and of `port` (0: none) that are granted, in the same order.

        Raises `SourceError` where none is.
        """
        if self._words is None:
            return list(paths), port
        granted = [path for path in paths if MYSQL + path in self._words]
        if MYSQL + str(port) not in self._words:
            port = 0
        if not granted and not port:
            raise SourceError("this key may not connect to a database there", _HINT)
        return granted, port
