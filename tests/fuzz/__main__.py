"""`make fuzz`: atheris goes on where `tests/test_fuzz.py` ends, guided by what each input reaches of the code.

    python -m tests.fuzz [TARGET] [SECONDS]

Without a TARGET each gets its SECONDS (60 by default), in a process of its own. What crashed one, hung, or took more
than the memory it may is written to ``tests/fuzz/crashers/TARGET``, for the suite to replay.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["blockdiff"]):
    from tests.fuzz.targets import TARGETS

CRASHERS = Path(__file__).parent / "crashers"
SECONDS = 60
#: How long one input may take, in seconds, and the memory that a target may hold, in MiB.
INPUT_TIMEOUT_S = 30
MEMORY_MIB = 1024
MAX_INPUT = 64 << 10


def fuzz(name: str, seconds: int) -> None:
    """Fuzz one target; ends the process."""
    crashers = CRASHERS / name
    crashers.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(TARGETS[name].seeds()):
            (Path(corpus) / str(number)).write_bytes(seed)
        limits = [f"-max_total_time={seconds}", f"-timeout={INPUT_TIMEOUT_S}", f"-rss_limit_mb={MEMORY_MIB}"]
        where = [f"-artifact_prefix={crashers}/", f"-max_len={MAX_INPUT}", "-print_final_stats=1", corpus]
        atheris.Setup([sys.argv[0], *limits, *where], TARGETS[name])
        atheris.Fuzz()


def main(words: list[str]) -> int:
    seconds = int(words.pop()) if words and words[-1].isdigit() else SECONDS
    if words and words[0] not in TARGETS:
        print(f"there is no target {words[0]}; there are {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    if words:
        fuzz(words[0], seconds)
    failed = []
    for name in TARGETS:
        print(f"== {name}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "tests.fuzz", name, str(seconds)]
        if subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0:
            failed.append(name)
    print(f"crashed: {', '.join(failed) or 'none'}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
