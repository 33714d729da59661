"""Chains that were written once, by the original and by ourselves, and must be read for ever; see golden/README.md."""

import json
import shutil
from pathlib import Path

import pytest

from tests import commands, conftest
from tests.protocol import BLOCK, GOLDEN, IMAGES, snapshot

PERL = ("perl-plain", "perl-gzip", "perl-lzop")
OWN = ("own-none", "own-gzip", "own-zstd", "own-md5", "own-manifest2")
ENV = {"BLOCKSIZE": str(BLOCK)}
NEXT = b"new" * 300 + bytes(600) + IMAGES[1]


def copied(chain: str, tmp_path: Path) -> Path:
    """Return the NAME of a copy of a golden chain."""
    if chain == "perl-lzop":
        conftest.require_program("lzop")
    (tmp_path / "backup").mkdir()
    for path in GOLDEN.glob(f"{chain}.*"):
        shutil.copyfile(path, tmp_path / "backup" / path.name)
    return tmp_path / "backup" / chain


def assert_holds(name: Path, images: list[bytes], out: Path) -> None:
    commands.done("blockdiff", "verify", name)
    for number, image in enumerate(images, 1):
        commands.done("blockdiff", "restore", "--force", f"{name}@{number}", out)
        assert out.read_bytes() == image, number


@pytest.mark.parametrize("chain", [*PERL, *OWN])
def test_golden_chains_verify_and_restore_exactly_and_are_not_written_to(chain: str, tmp_path: Path) -> None:
    name = copied(chain, tmp_path)
    before = snapshot(name.parent)
    assert_holds(name, IMAGES, tmp_path / "restored")
    assert snapshot(name.parent) == before


@pytest.mark.parametrize("chain", PERL)
def test_chains_of_the_original_are_listed_without_what_only_manifests_tell(chain: str, tmp_path: Path) -> None:
    listed = json.loads(commands.done("blockdiff", "list", "--json", copied(chain, tmp_path)))
    assert [(e["generation"], e["state"], e["digest"], e["image_size"]) for e in listed] == [
        (number, "no manifest", "md5", None) for number in (1, 2, 3, 4)
    ]


@pytest.mark.parametrize("chain", OWN)
def test_our_golden_chains_are_listed_with_their_sizes(chain: str, tmp_path: Path) -> None:
    listed = json.loads(commands.done("blockdiff", "list", "--json", copied(chain, tmp_path)))
    assert [(e["generation"], e["state"], e["image_size"], e["full"]) for e in listed] == [
        (number, "ok", len(image), number == 1) for number, image in enumerate(IMAGES, 1)
    ]


@pytest.mark.parametrize("chain", PERL)
def test_a_chain_of_the_original_goes_on_under_blockdiff_backup_and_under_blockdiff(chain: str, tmp_path: Path) -> None:
    """In the original's format, its block size and MD5."""
    name, source = copied(chain, tmp_path), tmp_path / "source"
    compression = {"perl-plain": [], "perl-gzip": ["-z"], "perl-lzop": ["--lzop"]}[chain]
    source.write_bytes(NEXT)
    result = commands.run("blockdiff_backup", name, "blockdiff_dump", *compression, source)
    assert (result.returncode, result.stderr) == (0, b"backup completed successfully\n")
    source.write_bytes(NEXT[:1000])
    commands.done("blockdiff", "backup", "--compression=none", name, source)
    made = json.loads(Path(f"{name}.6.json").read_bytes())
    assert (made["delta_format"], made["digest"], made["block_size"], made["full"]) == (1, "md5", BLOCK, False)
    assert (made["parent"]["generation"], made["changed_blocks"], made["image_size"]) == (5, 1, 1000)
    assert Path(f"{name}.6").stat().st_size == 4 + 8 + 1000 % BLOCK
    assert_holds(name, [*IMAGES, NEXT, NEXT[:1000]], tmp_path / "restored")


def test_a_chain_of_format_1_and_md5_is_byte_for_byte_what_the_original_writes(tmp_path: Path) -> None:
    """So it goes on under the original, whose merge can read it."""
    name, source = tmp_path / "disk", tmp_path / "source"
    options = ["--format=1", "--digest=md5", "--compression=none", f"--block-size={BLOCK}"]
    for number, image in enumerate(IMAGES, 1):
        source.write_bytes(image)
        commands.done("blockdiff", "backup", *options, name, source)
        for suffix in (f".{number}", f".{number}.md5"):
            assert Path(f"{name}{suffix}").read_bytes() == (GOLDEN / f"perl-plain{suffix}").read_bytes()
        assert Path(f"{name}.ver").read_bytes() == b"%d\n" % number
    assert Path(f"{name}.ver").read_bytes() == (GOLDEN / "perl-plain.ver").read_bytes()


def test_a_golden_chain_of_ours_takes_a_generation_of_another_source_only_with_full(tmp_path: Path) -> None:
    name, source = copied("own-md5", tmp_path), tmp_path / "source"
    source.write_bytes(NEXT)
    assert commands.run("blockdiff", "backup", name, source).returncode == 1
    commands.done("blockdiff", "backup", "--full", name, source)
    made = json.loads(Path(f"{name}.5.json").read_bytes())
    assert (made["delta_format"], made["digest"], made["block_size"], made["full"]) == (2, "md5", BLOCK, True)
    assert_holds(name, [*IMAGES, NEXT], tmp_path / "restored")


def test_a_golden_chain_of_ours_goes_on_under_blockdiff_backup(tmp_path: Path) -> None:
    """Its MD5 table is all that the descriptor protocol needs; the new delta is of version 1."""
    name, source = copied("own-md5", tmp_path), tmp_path / "source"
    source.write_bytes(NEXT)
    result = commands.run("blockdiff_backup", name, "blockdiff_dump", "-z", source, env=ENV)
    assert (result.returncode, result.stderr) == (0, b"backup completed successfully\n")
    assert json.loads(Path(f"{name}.5.json").read_bytes())["delta_format"] == 1
    assert_holds(name, [*IMAGES, NEXT], tmp_path / "restored")
