"""The first module that runs on the host: it reads the agent from standard input, checks it, and starts it.

Shipped to the host before everything else; it must run on any Python 3. Standard input continues with a line of JSON
(`size` of the archive in bytes, its `sha256`, a hexadecimal `nonce`, the `prefix`, which is a command that runs the
agent, and `trace` if a trace is asked for), and the archive: JSON with the source of each module by its full name,
compressed with zlib.
"""

import os
import sys

# exit statuses of the start on the host; 90 comes from the shell that looks for a Python
NO_PYTHON = 90
TOO_OLD = 91
DAMAGED = 92
NO_PREFIX = 93
OTHER_AGENT = 94
NO_MODULE = 95
OTHER_SHELL = 96

#: Comes first on standard input: if a shell was started instead of the agent, it reads this as a command, and ends.
FOR_SHELLS = "exit {}\n".format(OTHER_SHELL).encode("ascii")
#: What the remote command prints as soon as the login shell runs it.
BEGUN = b"blockdiff begins\n"
#: The first argument if only one agent is accepted. The others are the loader's source, the SHA-256 of the agent's
#: modules, and what is granted.
PINNED = "blockdiff-pinned"

# most bytes that are accepted: the owner of a pinned key may send anything
_MAX_AGENT = 16 << 20
_MAX_LOADER = 1 << 20
_MAX_HEADER = 256 << 10

#: The module that the loader starts.
AGENT = "blockdiff.host.agent"

START = "import sys;exec(bytes.fromhex(sys.argv[2]))"


def lacking(error: ImportError) -> "NoReturn":
    """End the process: this Python lacks standard modules, like Debian's python3-minimal."""
    sys.stderr.write("{}\n".format(error))
    sys.exit(NO_MODULE)


try:
    import hashlib
    import json
    import linecache
    import types
    import zlib
    from importlib import import_module
    from importlib.machinery import ModuleSpec
    from typing import NoReturn, Optional
except ImportError as error:
    lacking(error)


def read_exactly(count: int) -> bytes:
    """Return `count` bytes of standard input, and read no more than these: what follows is for the agent."""
    data = bytearray()
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            sys.exit(DAMAGED)
        data += more
    return bytes(data)


def read_header() -> dict:  # type: ignore[type-arg]  # dict[str, object] needs Python 3.9
    """Return the fields of the header line; ends the process if it is too long or is not a header."""
    line = bytearray()
    while line[-1:] != b"\n" and len(line) < _MAX_HEADER:
        line += read_exactly(1)
    try:
        header = json.loads(line.decode("ascii"))
        if isinstance(header["prefix"], list) and (header["prefix"] or isinstance(header["size"], int)):
            return dict(header)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    sys.exit(DAMAGED)


class Importer:
    """Imports the modules that were sent, each when it is needed, and keeps their sources for tracebacks."""

    def __init__(self, sources: dict) -> None:  # type: ignore[type-arg]  # dict[str, str] needs Python 3.9
        """`sources` has the source of each module by its full name; a package has its own entry."""
        self._sources = sources

    def find_spec(self, name: str, path: object = None, target: object = None) -> "Optional[ModuleSpec]":
        """Return what Python needs to import a module of ours; None for others. Part of the import protocol."""
        if name not in self._sources:
            return None
        package = any(other.startswith(name + ".") for other in self._sources)
        return ModuleSpec(name, self, origin="<{}>".format(name), is_package=package)  # type: ignore[arg-type]

    def create_module(self, spec: object) -> None:
        """Let Python create the module. Part of the import protocol."""

    def exec_module(self, module: types.ModuleType) -> None:
        """Run a module's source. Part of the import protocol."""
        name, source = module.__name__, self._sources[module.__name__]
        module.__file__ = "<{}>".format(name)
        linecache.cache[module.__file__] = (len(source), None, source.splitlines(True), module.__file__)
        exec(compile(source, module.__file__, "exec"), module.__dict__)


def agent(modules: bytes) -> types.ModuleType:
    """Return the agent's module of the archive `modules`; from then on, all modules in it can be imported."""
    sys.meta_path.insert(0, Importer(json.loads(modules.decode("utf-8"))))
    try:
        return import_module(AGENT)
    except ImportError as error:
        lacking(error)


def run_under(prefix: list) -> None:  # type: ignore[type-arg]  # list[str] needs Python 3.9
    """Replace this process by `prefix`, which runs the same start again; the server sends everything a second time."""
    try:
        os.execvp(prefix[0], prefix + [sys.executable, "-I", "-c", START] + sys.argv[1:])
    except OSError as error:
        sys.stderr.write("cannot run {}: {}\n".format(prefix[0], error.strerror))
        sys.exit(NO_PREFIX)


def start() -> None:
    """Read, check and run the agent; never returns, because the agent ends the process."""
    if sys.version_info < (3, 6):
        sys.exit(TOO_OLD)
    header = read_header()
    if header["prefix"]:
        run_under(header["prefix"])
    archive = read_exactly(header["size"])
    if hashlib.sha256(archive).hexdigest() != header["sha256"]:
        sys.exit(DAMAGED)
    agent(zlib.decompress(archive)).main(bytes.fromhex(header["nonce"]), None, "trace" in header)


def start_pinned(pinned: str, granted: list) -> None:  # type: ignore[type-arg]  # list[str] needs Python 3.9
    """Do the same, but only for the agent whose modules have the SHA-256 `pinned`, and let it do only what is granted.

    The loader that the server sends before it is skipped: nothing runs that was not checked.
    """
    os.write(1, BEGUN)
    read_exactly(len(FOR_SHELLS))
    size = read_exactly(8)
    if not size.isdigit() or int(size) > _MAX_LOADER:
        sys.exit(DAMAGED)
    read_exactly(int(size))
    header = read_header()
    if header["prefix"]:
        sys.stderr.write("this key runs nothing but the agent\n")
        sys.exit(NO_PREFIX)
    archive = read_exactly(min(header["size"], _MAX_AGENT))
    try:
        modules = zlib.decompressobj().decompress(archive, _MAX_AGENT)
    except zlib.error:
        sys.exit(DAMAGED)
    if hashlib.sha256(modules).hexdigest() != pinned:
        sys.exit(OTHER_AGENT)
    agent(modules).main(bytes.fromhex(header["nonce"]), granted, "trace" in header)


if __name__ == "__main__":
    if sys.argv[1:2] == [PINNED]:
        start_pinned(sys.argv[3], sys.argv[4:])
    else:
        start()
