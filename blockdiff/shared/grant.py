"""What a key may ask the agent for, if its line in ``authorized_keys`` limits it; other keys may ask for anything.

Shipped to the host: standard library only, Python 3.6 or newer.
"""

import os
from typing import Dict, List, Optional, Sequence, Tuple

from blockdiff.shared.errors import SourceError, printable

#: The prefix of a word that grants a database's socket, or its port on this machine: ``mysql:/run/mysqld/mysqld.sock``.
MYSQL = "mysql:"

#: Sent instead of a device's number for a directory that is not on the run's sources, or does not exist.
ELSEWHERE = "?"

_HINT = "`blockdiff authorize` makes the line for that host's authorized_keys that grants it"


class Grant:
    """The sources and sockets that `words` name; None allows everything."""

    def __init__(self, words: "Optional[Sequence[str]]" = None) -> None:
        self._words = words

    def check_sources(self, paths: "Sequence[str]", commands: "Sequence[str]") -> None:
        """Raise `SourceError` if one of the sources is not granted, or if a limited key asks to run a command."""
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
        """Return warnings about granted paths that are symbolic links, except in /dev, which only root can change."""
        if self._words is None:
            return []
        outside = [path for path in paths if not path.startswith("/dev/")]
        return [
            "{} leads to {} through a symbolic link: grant that instead".format(path, os.path.realpath(path))
            for path in outside
            if os.path.realpath(path) != os.path.normpath(path)
        ]

    def place(self, device: str, source: "Optional[int]") -> "Tuple[str, Optional[int]]":
        """Return what the key may know about the place of a directory: see `sources.locate`.

        A limited key learns nothing about a directory that is not on the run's sources, not even whether it exists.
        """
        return (device, source) if self._words is None or source is not None else (ELSEWHERE, None)

    def snapshots(self, found: "List[Dict[str, object]]") -> "List[Dict[str, object]]":
        """Return which of blockdiff's snapshots on the host the key may know about: they may be of others' sources."""
        return found if self._words is None else []

    def check_snapshots(self) -> None:
        """Raise `SourceError` for a limited key: snapshots that runs have left may be of others' sources."""
        if self._words is not None:
            raise SourceError(
                "this key may not list or remove snapshots",
                "run `blockdiff snapshots` with another key, or on that host",
            )

    def check_sockets(self, paths: "Sequence[str]", port: int) -> "Tuple[List[str], int]":
        """Return the sockets of `paths` that are granted, in the same order, and `port` if it is granted, else 0.

        Raises `SourceError` if nothing is granted.
        """
        if self._words is None:
            return list(paths), port
        granted = [path for path in paths if MYSQL + path in self._words]
        if MYSQL + str(port) not in self._words:
            port = 0
        if not granted and not port:
            raise SourceError("this key may not connect to a database there", _HINT)
        return granted, port
