"""The Pythons of this machine, one of each version from 3.6 on: the agent must run under each of them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def _candidates() -> list[Path]:
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = [shutil.which(f"python3.{minor}") for minor in range(6, 30)] + [shutil.which("python3")]
    named = [Path(path) for path in (*on_path, sys.executable) if path is not None]
    return sorted(root.glob("versions/*/bin/python3")) + named


def _version(python: Path) -> tuple[int, int] | None:
    """Return the version of an interpreter, None if it does not run (a pyenv shim may stand for no version)."""
    result = subprocess.run([python, "-V"], capture_output=True, text=True, timeout=60, check=False)
    match = re.match(r"Python (\d+)\.(\d+)", result.stdout)
    return (int(match[1]), int(match[2])) if match is not None and result.returncode == 0 else None


def _find() -> dict[str, Path]:
    found: dict[tuple[int, int], Path] = {}
    for python in _candidates():
        version = _version(python)
        if version is not None and version >= (3, 6):
            found.setdefault(version, python)
    return {f"{major}.{minor}": found[major, minor] for major, minor in sorted(found)}


#: The interpreters by version, such as ``3.6``.
INTERPRETERS = _find()
