"""What is shipped to servers: a wheel has the package and nothing else, and a source distribution can run its tests."""

import configparser
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import click
import pytest

from blockdiff.cli import modern
from tests.conftest import require, require_program

ROOT = Path(__file__).resolve().parent.parent


def tracked() -> list[str]:
    """Return the files that git knows; skips the test where this is not a checkout."""
    git = require_program("git")
    listed = subprocess.run([git, "-C", ROOT, "ls-files", "-z"], capture_output=True, timeout=60, check=False)
    require(listed.returncode == 0 and listed.stdout, "a checkout")
    return [name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).exists()]


def installed_commands() -> list[str]:
    """Return the names of the programs that are installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options.entry_points"]["console_scripts"].split("\n")
    return [name for line in lines if (name := line.partition("=")[0].strip())]


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
    names = installed_commands()
    for name in (*names, "python3", "pip"):
        (made / name).touch()
    line = link.replace("/opt/blockdiff/bin", str(made)).replace("/usr/local/bin", str(linked))
    for _ in range(2):
        subprocess.run([program, "-c", line], check=True, timeout=60)
    assert sorted(path.name for path in linked.iterdir()) == sorted(names)


def test_a_wheel_has_the_package_its_man_pages_and_nothing_that_an_older_build_left(
    dirty: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(built(dirty, "wheel")) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        pages = {name for name in names if name.endswith(".1")}
        wheel.extractall(tmp_path, pages)
    assert names - pages == {name for name in tracked() if name.startswith("blockdiff/")}
    commands = modern.cli.list_commands(click.Context(modern.cli))
    expected = [*installed_commands(), *(f"blockdiff-{name}" for name in commands)]
    assert {Path(name).stem for name in pages} == set(expected)
    assert all(".data/data/share/man/man1/" in name for name in pages)
    check_rendered([tmp_path / name for name in pages])


def test_what_a_build_needs_has_the_bounds_of_what_is_installed() -> None:
    words = (ROOT / "pyproject.toml").read_text().partition("requires = [")[2].partition("]")[0].replace('"', "")
    needed = [word.strip() for word in words.split(",")]
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert {word for word in needed if not word.startswith("setuptools")} <= set(
        setup["options"]["install_requires"].split()
    )


def check_rendered(pages: Sequence[Path]) -> None:
    """Fail where a page is not roff without faults, or has not all that --help says."""
    for page in pages:
        done = subprocess.run(
            [require_program("groff"), "-ww", "-man", "-Tutf8", "-P-c", "-rLL=1000n", page],
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), page
        text = re.sub(r"\x1b\[[0-9;]*m|.\x08", "", done.stdout.decode())
        assert "\nNAME\n" in text and "\nSYNOPSIS\n" in text and "-h, --help" in text
    (backup,) = (page for page in pages if page.stem == "blockdiff-backup")
    shown = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-cbou", "-rLL=1000n", backup], capture_output=True, check=True
    )
    assert b"\n  blockdiff backup /var/backup/web1 root@web1:/srv/web1.img\n" in shown.stdout.replace(
        b"\n       ", b"\n"
    )


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
