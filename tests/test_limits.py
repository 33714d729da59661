"""Runs under a limit on the size of files, or on memory: they do all of their work, or none, and say why."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import commands
from tests.chains import DAYS, some_days
from tests.conftest import require_program

pytestmark = pytest.mark.torture

MIB = 1 << 20
#: Limits on the size of a file in bytes: none at all, just below and above what each of the files has, and enough.
SIZES = (0, 1, 2, 3, 64, 100, 127, 128, 160, 191, 192, 193, 224, 225, 256, 320, 384, 512, 700, 1024, 2048, 4096, 8192)
#: Limits on the memory that a process may map, in MiB: from what is not enough for Python to begin, until it is enough.
MEMORIES = (8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 2048)


def limited(limit: str, *words: str | Path) -> "tuple[int, str]":
    """Run a command of ``bin/`` under prlimit(1); return its exit status and what it said."""
    result = commands.run(*words, under=[require_program("prlimit"), limit])
    return result.returncode, result.stderr.decode()


def swept(directory: Path, limits: "Sequence[str]") -> "list[tuple[int, str]]":
    """Run a backup and a restore of a small chain under each limit; return how the backups ended."""
    chain = some_days(directory, 2)
    chain.source.write_bytes(DAYS[2])
    ends = []
    before = chain.files()
    for number, limit in enumerate(limits):
        copy = chain.copy_to(directory / str(number))
        status, said = limited(limit, "blockdiff", "backup", copy.name, copy.source)
        if status == 0:
            copy.images[copy.last()] = copy.source.read_bytes()
            assert copy.last() == chain.last() + 1
        else:
            assert copy.files().items() >= before.items(), limit
            assert copy.last() == chain.last()
        ends.append((status, said))
        copy.assert_restores()
        target = directory / f"restored-{number}"
        status, _said = limited(limit, "blockdiff", "restore", copy.name, target)
        assert (target.read_bytes() == copy.restored()) if status == 0 else not target.exists()
        shutil.rmtree(copy.directory)
    return ends


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    ends = swept(tmp_path, [f"--fsize={size}" for size in SIZES])
    statuses = [status for status, _said in ends]
    assert statuses == sorted(statuses, reverse=True) and set(statuses) == {0, 1}
    for status, said in ends:
        assert "Traceback" not in said and bool(said) == bool(status)
        assert not status or "File too large" in said


def test_a_limit_on_memory(tmp_path: Path) -> None:
    """What a Python says that cannot even begin is not ours."""
    ends = swept(tmp_path, [f"--as={memory * MIB}" for memory in MEMORIES])
    assert ends[0][0] != 0 and ends[-1][0] == 0
    said = [said for _status, said in ends]
    assert not any("this is a bug in blockdiff" in each or "the agent failed" in each for each in said)
    assert any("there is not enough memory" in each and "ulimit -v" in each for each in said)
