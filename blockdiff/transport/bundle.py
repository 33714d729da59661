"""What is sent to a host: the command that finds a Python there, and the bytes that make this Python the agent.

The same bytes are used for hosts over SSH, for local sources, and in the tests.
"""

import hashlib
import json
import os
import shlex
import sys
import zlib
from collections.abc import Sequence
from functools import cache

from blockdiff import __version__
from blockdiff.host import loader

#: The rooms and modules of the package that are shipped: they need only the standard library.
SHIPPED = ("shared", "host", "dump", "lvm")

NONCE_SIZE = 16

# names of Python 3, the most common first; RHEL's own Python is not in the PATH
_PYTHONS = (
    "python3 /usr/libexec/platform-python /usr/bin/python3 /usr/local/bin/python3 "
    "python3.13 python3.12 python3.11 python3.10 python3.9 python3.8 python3.7 python3.6"
)

# runs the loader, which comes first on standard input after a line for shells and its size in 8 digits
_FIRST_LINES = b"""\
import os,sys
def take(n):
    data=b""
    while len(data)<n:
        more=os.read(0,n-len(data))
        if not more: sys.exit(%d)
        data+=more
    return data
if take(8)!=%r: sys.exit(%d)
exec(take(int(take(8))))
""" % (loader.DAMAGED, loader.FOR_SHELLS, loader.DAMAGED)

# Hexadecimal digits mean the same in every shell. The lines are a separate argument; the loader finds them at the same
# place when it starts itself again with a prefix.

_LABEL = "blockdiff-agent"

_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_LOADER = "host/loader.py"


def local_command() -> list[str]:
    """Return the command that starts the agent on this machine."""
    return [sys.executable, "-I", "-c", loader.START, _LABEL, _FIRST_LINES.hex()]


def remote_command() -> str:
    """Return the command line that starts the agent on a host: a constant, for every login shell.

    sh, csh and fish treat single quotes alike if there is no quote, backslash, exclamation mark or newline inside.
    """
    probe = '-I -c "import sys;sys.exit(sys.version_info<(3,6))" </dev/null 2>/dev/null'
    start = f'-I -c "{loader.START}" {_LABEL} {_FIRST_LINES.hex()}'
    script = (
        f"echo {loader.BEGUN.decode().strip()}; s={loader.NO_PYTHON}; "
        f"for p in {_PYTHONS}; do command -v $p >/dev/null 2>&1 || continue; "
        f"$p {probe} && exec $p {start}; s={loader.TOO_OLD}; done; exit $s"
    )
    return f"exec /bin/sh -c '{script}'"


def pinned_command(granted: Sequence[str]) -> str:
    """Return the command line for ``command=`` in ``authorized_keys`` that accepts only this version of the agent.

    `granted` says what the key may ask the agent for: see `blockdiff.shared.grant`. Each word is quoted for the login
    shell.
    """
    run = "import sys,zlib;exec(zlib.decompress(bytes.fromhex(sys.argv[2])))"
    source = zlib.compress(_source(_LOADER).encode("utf-8"), 9).hex()
    return f"python3 -Ic {shlex.quote(run)} {loader.PINNED} {source} {agent_id()} {shlex.join(granted)}"


def pinned_script() -> str:
    """Return the same as a program to install on the host; its arguments are what is granted."""
    return (
        f"#!/usr/bin/python3 -I\n# accepts the agent of blockdiff {__version__}, for what its arguments grant\n"
        f'import sys\nsys.argv[1:1] = ["{loader.PINNED}", "", "{agent_id()}"]\n{_source(_LOADER)}'
    )


def agent_id() -> str:
    """Return the SHA-256 of the shipped modules, in hexadecimal: a pinned key accepts only this one."""
    return hashlib.sha256(_modules()).hexdigest()


def startup(nonce: bytes, prefix: Sequence[str] = (), traced: bool = False) -> bytes:
    """Return what the command reads from standard input to become the agent, whose output begins with `nonce`.

    `prefix` is a command that runs the agent, such as ``ionice -c3 nice``. With `traced`, the agent sends a trace.
    """
    archive = _archive()
    first = _with_loader({"prefix": list(prefix)}) if prefix else b""
    digest = hashlib.sha256(archive).hexdigest()
    header = {"prefix": [], "size": len(archive), "sha256": digest, "nonce": nonce.hex()}
    return first + _with_loader({**header, "trace": True} if traced else header) + archive


def _with_loader(header: dict[str, object]) -> bytes:
    source = _source(_LOADER).encode("utf-8")
    return b"%s%08d%s%s\n" % (loader.FOR_SHELLS, len(source), source, json.dumps(header).encode("ascii"))


@cache
def _archive() -> bytes:
    return zlib.compress(_modules())


def _modules() -> bytes:
    sources = {_full_name(path): _source(path) for path in shipped() if path != _LOADER}
    return json.dumps({"blockdiff": "", **sources}).encode("utf-8")


@cache
def shipped() -> tuple[str, ...]:
    """Return the paths of the files that are shipped, relative to the package and sorted."""
    found = []
    for name in SHIPPED:
        if os.path.isdir(os.path.join(_PACKAGE, name)):
            found += [f"{name}/{file}" for file in os.listdir(os.path.join(_PACKAGE, name)) if file.endswith(".py")]
        else:
            found.append(f"{name}.py")
    return tuple(sorted(found))


def _full_name(path: str) -> str:
    return ".".join(["blockdiff", *path.removesuffix(".py").removesuffix("/__init__").split("/")])


@cache
def _source(path: str) -> str:
    with open(os.path.join(_PACKAGE, path), encoding="utf-8") as file:
        return file.read()
