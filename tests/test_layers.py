"""The rooms and their order, proved from the sources alone (fast: also part of `make check`)."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import blockdiff
from blockdiff.transport.bundle import shipped

PACKAGE = Path(blockdiff.__file__).parent

#: From the bottom up: a room, or a module of the top level, imports only what stands in its own line or above. Nothing
#: imports in a circle. A line has one room at most, so no two rooms import each other.
ORDER = """
    shared
    host  dump  lvm
    transport
    database
    format
    chain
    session
    merge  mysqllock  progress
    restore
    check
    replicapause
    original  quiesce
    plan  backup
    cli
    start  __main__
"""
LEVELS = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
SHIPPED = [PACKAGE / path for path in shipped()]

#: What is younger than Python 3.6 and yet in the shipped modules, always behind a guard that the 3.6 run of
#: test_shipped.py goes through: MD5 for hosts in FIPS mode, reads into a buffer that may not wait, and what
#: destructors raise.
GUARDED = (
    *("hashlib.md5(usedforsecurity)", "os.preadv", "os.RWF_NOWAIT"),
    *("sys.unraisablehook", "sys.__unraisablehook__"),
)
#: What a process of its own runs.
PROCESSES = ("host.agent", "host.loader")
OLDEST_PYTHON = "3.6"
VERMIN = "import vermin; vermin.main()"  # has no __main__


def module_name(path: Path) -> str:
    """Return the name of a module, without the package's."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(name: str) -> str:
    """Return the room of a module: the directory that it is in, or the module itself at the top level."""
    return name.partition(".")[0]


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports, whether at its top or inside a function."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full.removeprefix("blockdiff.") in MODULES else node.module


def imported_of_ours(path: Path) -> set[str]:
    """Return the modules of blockdiff that a file imports, without the package's name; its version is not a module."""
    return {name.partition(".")[2] for name in imported(path) if name.startswith("blockdiff.")}


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} == set(LEVELS)


def section(heading: str) -> str:
    """Return a section of docs/architecture.md."""
    text = (PACKAGE.parent / "docs" / "architecture.md").read_text("utf-8")
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def test_the_table_of_rooms_names_every_module() -> None:
    """Those of `cli/` have the names of the commands: the table says so, and no more."""
    named = set(re.findall(r"`(\w+)/?`", section("Rooms")))
    assert {name.rpartition(".")[2] for name in MODULES if not name.startswith("cli.")} <= named


def test_what_the_docs_look_for_is_where_they_say() -> None:
    rows = [line.split("|") for line in section("Where is it?").splitlines() if line.startswith("|")]
    answers = [row[2] for row in rows if "`" in row[2]]
    assert len(answers) > 20
    for answer in answers:
        names = re.findall(r"`([\w/.-]+)`", answer)
        files = [PACKAGE / name for name in names if "/" in name or "." in name]
        assert all(file.exists() for file in files), answer
        text = "".join(file.read_text("utf-8") for file in files if file.is_file())
        assert all(name in text for name in names if "/" not in name and "." not in name), answer


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upwards(name: str) -> None:
    upwards = {other for other in imported_of_ours(MODULES[name]) if LEVELS[room(other)] > LEVELS[room(name)]}
    assert not upwards


def test_nothing_imports_in_a_circle() -> None:
    graph = {name: imported_of_ours(path) - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", SHIPPED, ids=module_name)
def test_a_shipped_module_imports_only_the_standard_library_and_what_is_shipped(path: Path) -> None:
    assert imported_of_ours(path) <= {module_name(path) for path in SHIPPED}
    foreign = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"blockdiff"}
    assert foreign == ({"xxhash"} if module_name(path) == "shared.blocks" else set())


def test_the_loader_imports_the_standard_library_alone() -> None:
    assert {name.split(".")[0] for name in imported(PACKAGE / "host/loader.py")} <= set(sys.stdlib_module_names)


def test_the_one_optional_import_is_guarded() -> None:
    guarded = [
        statement.names[0].name
        for node in ast.walk(tree(PACKAGE / "shared/blocks.py"))
        if isinstance(node, ast.Try) and ast.unparse(node.handlers[0].type or ast.Constant(None)) == "ImportError"
        for statement in node.body
        if isinstance(statement, ast.Import)
    ]
    assert guarded == ["xxhash"]


def test_what_is_shipped_needs_no_newer_python() -> None:
    exclusions = [word for name in GUARDED for word in ("--exclude", name)]
    result = subprocess.run(
        [sys.executable, "-c", VERMIN, "--no-tips", "-vvv", f"--target={OLDEST_PYTHON}-", *exclusions, *SHIPPED],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_the_commands_know_the_commands() -> None:
    knowing = {room(name) for name, path in MODULES.items() if "cli" in map(room, imported_of_ours(path))}
    assert knowing <= {"cli", "start"}


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) != "cli" and name not in PROCESSES])
def test_only_the_commands_print_and_exit(name: str) -> None:
    forbidden = {"print", "exit", "quit", "input", "SystemExit"}
    forbidden |= {"sys.exit", "os._exit", "click.echo", "sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
    used = {ast.unparse(node) for node in ast.walk(tree(MODULES[name])) if isinstance(node, ast.Attribute | ast.Name)}
    assert not used & forbidden
    assert "click" not in {other.split(".")[0] for other in imported(MODULES[name])}


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "tools"}
    assert not drawers & {part for name in MODULES for part in name.split(".")}
