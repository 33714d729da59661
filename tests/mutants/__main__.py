"""``python -m tests.mutants [MODULE]…``: let the tests find each mutant; those that live must be explained.

Each mutant stands in a copy of the checkout, in which the tests of its module run until one fails. A library would
do this as well, but mutmut's mutants are whole modules full of detours, which cannot be sent to a host as an agent, and
cosmic-ray makes a dozen of each operator.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutations import Mutant, mutants

#: The checkout.
ROOT = Path(__file__).resolve().parents[2]
#: What of it the tests do not need, and what could be from before.
_LEFT_OUT = (".*", "__pycache__", "build", "*.egg-info")
#: The tests of each module, those first that find most in the shortest time.
TESTS = {
    "shared/wire": ("test_wire", "test_hostile_agent", "test_agent"),
    "format/digesttable": ("test_digesttable", "test_golden", "test_damage"),
    "merge": ("test_restore", "test_golden", "test_damage", "test_history"),
    "chain/commit": ("test_commit", "test_recovery", "test_concurrency", "test_power_cut"),
}
#: More than there are CPUs, as mutants that hang only wait.
_WORKERS = 4
#: The tests of a module may take so long, in seconds, where nothing is changed.
_TIMEOUT_S = 600.0
_PYTEST = ("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "")
#: The list of those that live, and why: see `explained`.
EXPLAINED = Path(__file__).with_name("explained.md")


class Copy:
    """A copy of the checkout at `place`, in which one module is replaced at a time."""

    def __init__(self, place: Path, module: str) -> None:
        self._place = place
        self._path = place / "blockdiff" / f"{module}.py"
        self._words = [sys.executable, *_PYTEST, *(f"tests/{name}.py" for name in TESTS[module])]
        shutil.copytree(ROOT, place, ignore=shutil.ignore_patterns(*_LEFT_OUT), dirs_exist_ok=True)

    def passes(self, source: str, timeout_s: float) -> bool:
        """Return whether the tests pass with this source of the module; they do not where they take too long."""
        self._path.write_text(source)
        # a module that was changed twice within a second looks like the one that was compiled
        env = {**os.environ, "PYTHONPATH": str(self._place), "PYTHONDONTWRITEBYTECODE": "1"}
        null = subprocess.DEVNULL
        with subprocess.Popen(
            self._words, cwd=self._place, env=env, stdin=null, stdout=null, stderr=null, start_new_session=True
        ) as process:
            try:
                return process.wait(timeout_s) == 0
            except subprocess.TimeoutExpired:
                return False
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # with whatever the tests have started


def survivors(module: str, found: Sequence[Mutant]) -> list[Mutant]:
    """Return those of the mutants of a module that its tests do not find."""
    original = (ROOT / "blockdiff" / f"{module}.py").read_text()
    with ExitStack() as stack:
        places = [
            stack.enter_context(tempfile.TemporaryDirectory(prefix="blockdiff-mutants-")) for _ in range(_WORKERS)
        ]
        copies: SimpleQueue[Copy] = SimpleQueue()
        for place in places:
            copies.put(Copy(Path(place), module))
        begun = time.monotonic()
        first = copies.get()
        if not first.passes(original, _TIMEOUT_S):
            raise SystemExit(f"the tests of {module} fail without any change")
        timeout_s = 4 * (time.monotonic() - begun) + 10
        copies.put(first)

        def lives(mutant: Mutant) -> bool:
            copy = copies.get()
            try:
                return copy.passes(mutant.source, timeout_s)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(_WORKERS) as pool:
            living = []
            for mutant, is_alive in zip(found, pool.map(lives, found), strict=True):
                if is_alive:
                    living.append(mutant)
                    print(f"{module}.py:{mutant.line}: lives: {mutant.key}", flush=True)
            return living


def explained(module: str) -> list[str]:
    """Return the entries of the list for a module: each begins with a mutant's key, and goes on with the reason."""
    _, _, section = EXPLAINED.read_text().partition(f"\n## {module}\n")
    entries = section.partition("\n## ")[0].split("\n* ")[1:]
    return [" ".join(entry.split()) for entry in entries]


def check(module: str) -> bool:
    """Run all mutants of a module; return whether all that live are explained, and the list has no others."""
    found = list(mutants((ROOT / "blockdiff" / f"{module}.py").read_text()))
    print(f"{module}: {len(found)} mutants", flush=True)
    entries = explained(module)
    living = survivors(module, found)
    keys = [mutant.key for mutant in living]
    unexplained = [key for key in keys if not any(entry.startswith(f"{key}: ") for entry in entries)]
    stale = [entry for entry in entries if not any(entry.startswith(f"{key}: ") for key in keys)]
    print(f"{module}: {len(living)} of {len(found)} live, {len(unexplained)} of them unexplained")
    for entry in stale:
        print(f"{module}: in the list, but no longer alive: {entry}")
    return not unexplained and not stale


def main(modules: Sequence[str]) -> int:
    """Check the modules; return the exit status."""
    verdicts = [check(module) for module in modules or TESTS]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
