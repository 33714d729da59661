"""Check what setup.cfg says of the dependencies: ``python3 -m tests.dependencies oldest`` (or ``newest``).

It makes a source distribution, and runs the smoke tests in it, in a new environment with the lower bounds that
setup.cfg declares, or with the newest releases.
"""

import configparser
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_TOOLS = ("pytest", "pytest-timeout", "hypothesis", "setuptools>=70.1")


def declared() -> list[str]:
    """Return the requirements of setup.cfg, each as NAME>=VERSION."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config["options"]["install_requires"].split()


def smoke(requirements: list[str], place: Path) -> int:
    """Return the exit status of the smoke tests of a source distribution with some requirements."""
    venv.create(place / "venv", with_pip=True)
    python = str(place / "venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--prefer-binary"]
    subprocess.run([*install, *requirements, *TEST_TOOLS], check=True)
    build = f"from setuptools import build_meta; build_meta.build_sdist({str(place)!r})"
    subprocess.run([python, "-c", build], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    (archive,) = place.glob("blockdiff-*.tar.gz")
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(place)], check=True)
    tests = [python, "-m", "pytest", "-q", "-o", "filterwarnings=default", "tests/test_smoke.py"]
    return subprocess.run(tests, check=False, cwd=place / archive.name.removesuffix(".tar.gz")).returncode


def main(which: str) -> int:
    """Run the smoke tests and return their exit status."""
    requirements = declared() if which == "newest" else [each.replace(">=", "==") for each in declared()]
    print(f"the {which} dependencies: {' '.join(requirements)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="blockdiff-dependencies-") as place:
        return smoke(requirements, Path(place))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
