"""The README's recipe for a restore without blockdiff, read from the README."""

import re
import subprocess
import sys
from pathlib import Path

README = Path(__file__).resolve().parent.parent / "README.md"
HEADING = "## Restore without blockdiff\n"


def section() -> str:
    """Return the recipe's section, from its heading to the next one."""
    after = README.read_text().partition(HEADING)[2]
    assert after, "the README has no recipe"
    return re.split(r"^## ", after, maxsplit=1, flags=re.MULTILINE)[0]


def code(language: str) -> str:
    """Return the section's only block of code in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
    return str(block)


def apply(delta: bytes, image: Path, table: Path) -> "subprocess.CompletedProcess[bytes]":
    """Apply one decompressed delta to an existing image, with the recipe's program."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code("python"), image, table],
        input=delta,
        capture_output=True,
        timeout=60,
        check=False,
    )
