"""Read option files of MySQL and MariaDB (``my.cnf``) by the rules of their own clients.

The rules: groups are in brackets. `#` begins a comment anywhere outside quotes, `;` only at the beginning of a line. A
value may be in single or double quotes. The escapes are ``\\b \\t \\n \\r \\\\ \\s \\' \\"``; other backslashes stay.
In names, dashes and underscores mean the same. ``!include FILE`` includes a file, ``!includedir DIRECTORY`` its
``*.cnf``, sorted.
"""

import os
import re
import stat
from collections.abc import Collection

from blockdiff.shared.errors import UsageError, printable

#: How deep files may include each other; the clients have the same limit.
_DEPTH_LIMIT = 10
_SIZE_LIMIT = 1 << 20
_WHITE = " \t\n\v\f\r"
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_ESCAPED = {"b": "\b", "t": "\t", "n": "\n", "r": "\r", "s": " ", "\\": "\\", "'": "'", '"': '"'}
_INCLUDE = re.compile(r"!\s*(include|includedir)\s+(.*)", re.DOTALL)


class _Reader:
    """Collects the options of the requested groups."""

    def __init__(self, groups: Collection[str]) -> None:
        self._groups = groups
        self.options: dict[str, str | None] = {}

    def read(self, path: str, depth: int = 0) -> None:
        try:
            with open(path, "rb") as file:
                private = not os.fstat(file.fileno()).st_mode & (stat.S_IRWXG | stat.S_IRWXO)
                text = file.read(_SIZE_LIMIT).decode("utf-8", "surrogateescape")
        except OSError as error:
            if depth:
                return  # the clients also ignore an included file that they cannot read
            raise UsageError(f"cannot read the option file {printable(path)}: {error.strerror}") from error
        group: str | None = None
        for number, line in enumerate(text.split("\n"), 1):
            place = f"{printable(path)}, line {number}"
            line = line.strip(_WHITE)
            if not line or line[0] in "#;":
                continue
            if line[0] == "!":
                self._include(line, place, depth)
            elif line[0] == "[":
                if "]" not in line:
                    raise UsageError(f"{place}: a group without its closing bracket")
                group = line[1:].partition("]")[0].rstrip(_WHITE)
            elif group is None:
                raise UsageError(f"{place}: an option before the first group")
            elif group in self._groups:
                self._read_line(line, private, path)

    def _read_line(self, line: str, private: bool, path: str) -> None:
        name, value = _option(line)
        if name == "password" and value and not private:
            raise UsageError(
                f"the option file {printable(path)} contains a password and can be read by others",
                f"chmod 600 {printable(path)}",
            )
        self.options[name] = value

    def _include(self, line: str, place: str, depth: int) -> None:
        match = _INCLUDE.fullmatch(line)
        if match is None:
            return  # the clients ignore what they do not know
        if depth >= _DEPTH_LIMIT:
            raise UsageError(f"{place}: files include each other more than {_DEPTH_LIMIT} deep")
        if "\0" in match[2]:
            raise UsageError(f"{place}: a path cannot contain a NUL character")
        path = os.path.expanduser(match[2])
        if match[1] == "include":
            self.read(path, depth + 1)
            return
        try:
            names = sorted(name for name in os.listdir(path) if name.endswith(".cnf"))
        except OSError as error:
            raise UsageError(f"{place}: cannot read the directory {printable(path)}: {error.strerror}") from error
        for name in names:
            self.read(os.path.join(path, name), depth + 1)


def read(path: str, groups: Collection[str]) -> dict[str, str | None]:
    """Return the options of `groups` in a file and in the files that it includes. If one is repeated, the last counts.

    Names have underscores instead of dashes, and no ``loose_``; an option without ``=`` has the value None. Bytes that
    are not UTF-8 are kept as surrogates. Raises `UsageError` if the file cannot be read or is not valid, and if a file
    with a password in one of the groups can be read by other users. No message quotes a line.
    """
    reader = _Reader(groups)
    reader.read(path)
    return reader.options


def _option(line: str) -> tuple[str, str | None]:
    """Return name and value of a line with an option."""
    line = _without_comment(line)
    name, equals, value = line.partition("=")
    name = name.rstrip(_WHITE).replace("-", "_").removeprefix("loose_")
    if not equals:
        return name, None
    value = value.strip(_WHITE)
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return name, _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[0]), value)


def _without_comment(line: str) -> str:
    """Return what is before the first `#` outside quotes. Only inside quotes, a backslash escapes a quote."""
    quote, escaped = "", False
    for position, character in enumerate(line):
        if character in "'\"" and not escaped:
            if not quote:
                quote = character
            elif quote == character:
                quote = ""
        if character == "#" and not quote:
            return line[:position]
        escaped = bool(quote) and character == "\\" and not escaped
    return line
