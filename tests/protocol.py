"""The original's commands, run with its descriptors; what its dump writes; and the examples of `docs/format.md`."""

import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests import commands

GOLDEN = Path(__file__).resolve().parent / "golden"
#: The document that specifies the files.
FORMAT = (GOLDEN.parent.parent / "docs" / "format.md").read_text()
#: The golden images, and the size of their blocks in bytes.
IMAGES = [(GOLDEN / f"image.{n}").read_bytes() for n in (1, 2, 3, 4)]
BLOCK = 512


def example(name: str) -> bytes:
    """Return the bytes of the example ``hex NAME`` in the document: pairs of digits, up to three blanks in a line."""
    (block,) = re.findall(rf"^```hex {re.escape(name)}\n(.*?)^```", FORMAT, re.MULTILINE | re.DOTALL)
    return b"".join(bytes.fromhex(line.split("   ")[0]) for line in str(block).splitlines())


def dumped(image: bytes, block_size: int, old_table: bytes | None = None) -> tuple[bytes, bytes]:
    """Return the delta and the digest table that the original's dump writes for an image."""
    delta = table = block_size.to_bytes(4, "little")
    for offset in range(0, len(image), block_size):
        block = image[offset : offset + block_size]
        digest = hashlib.md5(block).digest()
        if old_table is None or old_table[len(table) : len(table) + 16] != digest:
            delta += offset.to_bytes(8, "little") + block
        table += digest
    return delta, table


def run(
    program: str,
    *arguments: str | Path,
    new: Path | None,
    old: Path | None = None,
    stdin: Path | bytes = b"",
    env: Mapping[str, str] | None = None,
    stdout: Path | None = None,
    caller: str = "",
) -> "subprocess.CompletedProcess[bytes]":
    """Run a command of ``bin/`` with the old digest table on descriptor 5 and the new one on 6, if they are given.

    If `stdin` is a path, standard input is this file; bytes come through a pipe. `caller` is a further redirection.
    """
    redirections = ["5<$OLD" if old else "5<&-", "6>$NEW" if new else "6>&-", *([">$OUT"] if stdout else []), caller]
    words = [sys.executable, commands.BIN / program, *arguments]
    shell = ["sh", "-c", 'exec "$@" ' + " ".join(redirections), "sh", *words]
    environment = {name: value for name, value in os.environ.items() if name not in ("BLOCKSIZE", "VERBOSE")}
    environment.update(PATH=commands.PATH, OLD=str(old), NEW=str(new), OUT=str(stdout))
    environment.update(env or {})
    if isinstance(stdin, bytes):
        return subprocess.run(shell, input=stdin, env=environment, capture_output=True, timeout=120, check=False)
    with stdin.open("rb") as file:
        return subprocess.run(shell, stdin=file, env=environment, capture_output=True, timeout=120, check=False)


def snapshot(directory: Path) -> dict[str, bytes]:
    """Return the files in a directory with their contents, without locks."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix != ".lock"}
