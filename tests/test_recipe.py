"""The README's recipe restores without blockdiff, as it stands there."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.transport.address import Address
from tests import conftest, recipe

IMAGES = [b"one" * 40_000 + bytes(300_000) + b"tail", b"two" * 40_000 + bytes(10) + b"x" * 500_000, b"one" * 30_001]


def test_the_recipe_is_short_and_needs_nothing_but_the_standard_library() -> None:
    code = recipe.code("python")
    assert len(code.splitlines()) <= 25
    imported = {
        alias.name for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"os", "struct", "sys"}
    assert not any(isinstance(node, ast.ImportFrom) for node in ast.walk(ast.parse(code)))


@pytest.mark.parametrize("delta_format", [1, 2])
def test_the_recipe_restores_a_chain_as_the_readme_says(delta_format: int, tmp_path: Path) -> None:
    """Both blocks of code are run as they are: three gzip deltas, in a shell."""
    conftest.require_program("zcat")
    options = backup.Options(block_size=1000, delta_format=delta_format)
    for image in IMAGES:
        (tmp_path / "source").write_bytes(image)
        backup.backup(str(tmp_path / "web1-disk"), Address(None, str(tmp_path / "source")), options)
    (tmp_path / "apply.py").write_text(recipe.code("python"))
    done = subprocess.run(
        ["sh", "-e", "-c", recipe.code("sh")],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "web1.img").read_bytes() == IMAGES[2]


def test_the_recipe_complains_about_a_delta_of_version_2_that_is_cut_anywhere(tmp_path: Path) -> None:
    """But for the checksum of the table, its last 32 bytes, which the recipe does not read."""
    name = str(tmp_path / "disk")
    (tmp_path / "source").write_bytes(b"abc" + bytes(50) + b"def")
    backup.backup(
        name, Address(None, str(tmp_path / "source")), backup.Options(block_size=10, digest="md5", compression="none")
    )
    delta = Path(name + ".1").read_bytes()
    for length in [*range(0, len(delta) - 32, 13), len(delta) - 33]:
        (tmp_path / "image").write_bytes(b"")
        done = recipe.apply(delta[:length], tmp_path / "image", Path(name + ".1.md5"))
        assert done.returncode != 0, length
        assert b"struct.error" in done.stderr


def test_the_recipe_keeps_zeros_of_a_new_file_as_holes(tmp_path: Path) -> None:
    image = b"begin" + bytes(8 << 20) + b"end"
    name = str(tmp_path / "disk")
    (tmp_path / "source").write_bytes(image)
    backup.backup(name, Address(None, str(tmp_path / "source")), backup.Options(compression="none"))
    (tmp_path / "image").touch()
    done = recipe.apply(Path(name + ".1").read_bytes(), tmp_path / "image", Path(name + ".1.sha256"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "image").read_bytes() == image
    assert (tmp_path / "image").stat().st_blocks * 512 < 1 << 20
