"""What a key may ask the agent for, if its line in ``authorized_keys`` says so; other keys may ask for anything.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
from typing import Dict, List, Optional, Sequence, Tuple

from blockdiff.shared.errors import SourceError, printable

#: Begins the word for a database's socket, or for its port on this machine: ``mysql:/run/mysqld/mysqld.sock``.
MYSQL = "mysql:"

#: In place of a device's number: a directory that is not on the sources of the run, or is not there.
ELSEWHERE = "?"

_HINT = "`blockdiff authorize` makes the line for that host's authorized_keys that grants it"


class Grant:
    """The sources and sockets that `words` name; None stands for everything."""

    def __init__(self, words: "Optional[Sequence[str]]" = None) -> None:
        self._words = words

    def check_sources(self, paths: "Sequence[str]", commands: "Sequence[str]") -> None:
        """Raise `SourceError` if one of the sources is not granted, or a command is to be run."""
        if self._words is None:
            return
        for path in paths:
            if path not in self._words:
                raise SourceError("this key may not read {}".format(printable(path)), _HINT)
        if commands:
            raise SourceError(
                "this key may not run commands: {}".format(printable(commands[0])), "omit --before and --after"
            )

    def notes(self, paths: "Sequence[str]") -> "List[str]":
        """Return what to say of granted sources that lead elsewhere; what is in /dev is root's alone to change."""
        if self._words is None:
            return []
        outside = [path for path in paths if not path.startswith("/dev/")]
        return [
            "{} leads to {} through a symbolic link: grant that instead".format(path, os.path.realpath(path))
            for path in outside
            if os.path.realpath(path) != os.path.normpath(path)
        ]

    def place(self, device: str, source: "Optional[int]") -> "Tuple[str, Optional[int]]":
        """Return what the key may know of where a directory is: see `sources.locate`.

        Of what is not on the granted sources of the run a limited key learns nothing, not even whether it exists.
        """
        return (device, source) if self._words is None or source is not None else (ELSEWHERE, None)

    def snapshots(self, found: "List[Dict[str, object]]") -> "List[Dict[str, object]]":
        """Return what the key may know of the snapshots of ours that are there: they may be others'."""
        return found if self._words is None else []

    def check_snapshots(self) -> None:
        """Raise `SourceError` if only some sources are granted: what runs left there may be others'."""
        if self._words is not None:
            raise SourceError(
                "this key may not list or remove snapshots",
                "run `blockdiff snapshots` with another key, or on that host",
            )

    def check_sockets(self, paths: "Sequence[str]", port: int) -> "Tuple[List[str], int]":
        """Return those of the sockets `paths` and of `port` (0: none) that are granted, in the same order.

        Raises `SourceError` if none is.
        """
        if self._words is None:
            return list(paths), port
        granted = [path for path in paths if MYSQL + path in self._words]
        if MYSQL + str(port) not in self._words:
            port = 0
        if not granted and not port:
            raise SourceError("this key may not connect to a database there", _HINT)
        return granted, port
