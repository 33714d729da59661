"""The README's recipe for a restore without blockdiff, as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEADING = "## Restore without blockdiff\n"
#: The section has a document of its own where the README does not hold it.
DOCUMENTS = (ROOT / "README.md", ROOT / "docs" / "restore-without-blockdiff.md")


def section() -> str:
    """Return the recipe's section, from its heading to the next one."""
    for document in DOCUMENTS:
        if document.exists() and HEADING in (text := document.read_text()):
            found = re.split(r"^## ", text.partition(HEADING)[2], maxsplit=1, flags=re.MULTILINE)[0]
            if "```python\n" in found:
                return found
    raise AssertionError("no document has the recipe")


def code(language: str) -> str:
    """Return the section's one block of code in this language."""
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
    return str(block)


def apply(delta: bytes, image: Path, table: Path) -> "subprocess.CompletedProcess[bytes]":
    """Apply one decompressed delta to an image that is there, by the recipe's program."""
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", code("python"), image, table],
        input=delta,
        capture_output=True,
        timeout=60,
        check=False,
    )
