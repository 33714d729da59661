"""The two rings and their order, proved from the sources alone (fast: also part of `make check`)."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import blockdiff
from blockdiff.bundle import SHIPPED

PACKAGE = Path(blockdiff.__file__).parent

#: From the bottom up: a module imports only what stands in a line above its own. Modules that share a line know nothing
#: of each other. The lines up to the agent are the shipped ring.
ORDER = """
    errors  loader
    blocks
    pipeline
    signals
    wire
    process
    extents
    devices
    lease
    dump
    witness
    lvs
    lvcheck
    lvm
    thin
    leftovers
    freeze
    sources
    datadir
    tablefeed
    sharedbuffers
    relay
    grant
    restraint
    agent
    bundle  checksum  address  clock  progress  publickey  sharing  owner
    durable  temporary
    lzop
    codec
    mysqloptions  coordinates
    mysqlaccount  mysqlfiles  redolog
    mysqlsocket  mysqlplugins
    mysqlsession
    mysqllock
    deltafile  manifest  lockcommand
    digesttable
    deltawriter  tunnel  tablesender
    inventory
    chain
    commit  periods
    merge
    sharedmemory
    transport.advice
    transport.connection
    transport.child
    transport.knownhosts  transport.sshconfig
    transport.openssh  transport.paramiko_ssh
    transport
    rules
    session  consistency
    replicapause
    quiesce  streams  compare  snapshots
    plan
    inuse  contents  offsetwriter
    filetarget  devicetarget
    apply  target  verify  listing  renamed
    proofs  salvage  rebuild
    repair
    descriptors
    command_backup  backup  cronlog  status  overview
    cli.progressbar  cli.standard
    cli  cli.volumes  cli.newest
    cli.backup  cli.list  cli.restore  cli.status  cli.verify  cli.repair  cli.authorize  cli.snapshots
    cli.modern  cli.original  cli.locking
    start
    __main__
"""
LEVELS = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}
SHIPPED_FILES = [PACKAGE / f"{name}.py" for name in (*SHIPPED, "loader")]

#: What is younger than Python 3.6 and yet in the shipped modules, always behind a guard that the 3.6 run of
#: test_shipped.py goes through: MD5 for hosts in FIPS mode, reads into a buffer that may not wait, and what
#: destructors raise.
GUARDED = (
    *("hashlib.md5(usedforsecurity)", "os.preadv", "os.RWF_NOWAIT"),
    *("sys.unraisablehook", "sys.__unraisablehook__"),
)
OLDEST_PYTHON = "3.6"
VERMIN = "import vermin; vermin.main()"  # has no __main__


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


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
            if (
                node.module == "blockdiff"
                or f"{node.module}.{node.names[0].name}".removeprefix("blockdiff.") in MODULES
            ):
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def imported_of_ours(path: Path) -> set[str]:
    """Return the modules of blockdiff that a file imports, without the package's name; its version is no module."""
    ours = {name.partition(".")[2] for name in imported(path) if name.split(".")[0] == "blockdiff"}
    return ours - {"__version__"}


def test_every_module_has_its_place() -> None:
    assert set(MODULES) == set(LEVELS)


@pytest.mark.parametrize("name", LEVELS)
def test_nothing_imports_upwards(name: str) -> None:
    upwards = {other for other in imported_of_ours(MODULES[name]) if LEVELS[other] >= LEVELS[name]}
    assert not upwards


def test_the_shipped_modules_stand_in_the_order_in_which_they_are_sent() -> None:
    ring = [name for name in LEVELS if name in SHIPPED]
    assert tuple(ring) == SHIPPED
    assert set(list(LEVELS)[: len(SHIPPED) + 1]) == {*SHIPPED, "loader"}


@pytest.mark.parametrize("position", range(len(SHIPPED)))
def test_a_shipped_module_imports_only_the_standard_library_and_what_is_sent_before_it(position: int) -> None:
    path = PACKAGE / f"{SHIPPED[position]}.py"
    assert imported_of_ours(path) <= set(SHIPPED[:position])
    foreign = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"blockdiff"}
    assert foreign == ({"xxhash"} if SHIPPED[position] == "blocks" else set())


def test_the_loader_imports_the_standard_library_alone() -> None:
    assert {name.split(".")[0] for name in imported(PACKAGE / "loader.py")} <= set(sys.stdlib_module_names)


def test_the_one_optional_import_is_guarded() -> None:
    guarded = [
        statement.names[0].name
        for node in ast.walk(tree(PACKAGE / "blocks.py"))
        if isinstance(node, ast.Try) and ast.unparse(node.handlers[0].type or ast.Constant(None)) == "ImportError"
        for statement in node.body
        if isinstance(statement, ast.Import)
    ]
    assert guarded == ["xxhash"]


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: str(path.stem))
def test_a_shipped_module_needs_no_newer_python(path: Path) -> None:
    exclusions = [word for name in GUARDED for word in ("--exclude", name)]
    result = subprocess.run(
        [sys.executable, "-c", VERMIN, "--no-tips", "-vvv", f"--target={OLDEST_PYTHON}-", *exclusions, path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_only_the_commands_know_the_commands() -> None:
    knowing = {name for name, path in MODULES.items() if any(o.split(".")[0] == "cli" for o in imported_of_ours(path))}
    assert {name for name in knowing if name.split(".")[0] != "cli"} <= {"__main__", "start"}


@pytest.mark.parametrize("name", [name for name in LEVELS if name.split(".")[0] not in ("cli", "agent", "loader")])
def test_only_the_commands_print_and_exit(name: str) -> None:
    forbidden = {"print", "exit", "quit", "input", "SystemExit"}
    forbidden |= {"sys.exit", "os._exit", "click.echo", "sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
    used = {ast.unparse(node) for node in ast.walk(tree(MODULES[name])) if isinstance(node, ast.Attribute | ast.Name)}
    assert not used & forbidden
    assert "click" not in {other.split(".")[0] for other in imported(MODULES[name])}


def test_no_module_is_a_drawer_for_odds_and_ends() -> None:
    drawers = {"util", "utils", "helper", "helpers", "common", "misc", "tools"}
    assert not drawers & {part for name in MODULES for part in name.split(".")}
