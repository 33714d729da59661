"""What is shipped to servers: a wheel has the package and nothing else, and a source distribution can run its tests."""

import configparser
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import require, require_program

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    """Return the files that git knows; skips the test where this is not a checkout."""
    git = require_program("git")
    listed = subprocess.run([git, "-C", ROOT, "ls-files", "-z"], capture_output=True, timeout=60, check=False)
    require(listed.returncode == 0 and listed.stdout, "a checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]


@pytest.fixture(scope="module")
def dirty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout in which an older version was built, tests have run, and an editor left something."""
    place = tmp_path_factory.mktemp("packaging") / "checkout"
    for name in tracked():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes((ROOT / name).read_bytes())
    for name in (
        *("build/lib/blockdiff/stale.py", "build/lib/blockdiff/cli/stale.py", "build/lib/other/__init__.py"),
        *("blockdiff/__pycache__/chain.cpython-311.pyc", "tests/__pycache__/chains.cpython-311.pyc"),
        *(".hypothesis/stale", ".venv/lib/stale.py", "dist/stale.tar.gz", "blockdiff_old/__init__.py"),
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("stale = True\n")
    return place


def built(checkout: Path, kind: str) -> Path:
    """Return what is built of a checkout: a ``wheel`` or an ``sdist``."""
    out = checkout.parent / kind
    out.mkdir()
    build = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr.decode()
    (found,) = out.iterdir()
    return found


@pytest.mark.parametrize("shell", ["sh", "bash", "fish", "csh"])
def test_the_commands_are_linked_by_any_shell_and_again(tmp_path: Path, shell: str) -> None:
    """As the README says it; an older installation does not stand in the way."""
    program = require_program(shell)
    install = (ROOT / "README.md").read_text().partition("## Install")[2].split("```")[1].split("\n")
    assert install.index("umask 022") < install.index("python3 -m venv /opt/blockdiff")
    (link,) = [line for line in install if line.startswith("ln ")]
    made, linked = tmp_path / "opt" / "bin", tmp_path / "usr"
    made.mkdir(parents=True)
    linked.mkdir()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    names = [line.partition("=")[0].strip() for line in setup["options.entry_points"]["console_scripts"].split("\n")]
    names = [name for name in names if name]
    for name in (*names, "python3", "pip"):
        (made / name).touch()
    line = link.replace("/opt/blockdiff/bin", str(made)).replace("/usr/local/bin", str(linked))
    for _ in range(2):
        subprocess.run([program, "-c", line], check=True, timeout=60)
    assert sorted(path.name for path in linked.iterdir()) == sorted(names)


def test_a_wheel_has_the_package_and_nothing_that_an_older_build_left(dirty: Path) -> None:
    with zipfile.ZipFile(built(dirty, "wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in tracked() if name.startswith("blockdiff/")}


def test_a_source_distribution_has_all_that_is_tracked_and_runs_its_tests(dirty: Path, tmp_path: Path) -> None:
    archive = built(dirty, "sdist")
    subprocess.run(["tar", "-xzf", archive, "-C", tmp_path], check=True, timeout=60)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert set(tracked()) - {".gitignore"} <= names
    assert not any("stale" in name or "__pycache__" in name or name.startswith("blockdiff_old") for name in names)
    (unpacked,) = tmp_path.iterdir()
    tests = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_golden.py",
        "tests/test_checkout.py",
    ]
    done = subprocess.run(tests, cwd=unpacked, capture_output=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout.decode()
