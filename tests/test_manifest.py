"""Manifests: what they say, that they say it the same way when read again, and what is refused."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from blockdiff import manifest
from blockdiff.errors import DamagedError
from tests import chains
from tests.chains import DAYS

EXAMPLE = manifest.Manifest(
    chain="0123456789abcdef",
    generation=2,
    parent=manifest.Parent(1, "ab" * 32),
    full=False,
    delta_format=2,
    delta=manifest.StoredFile(".gz", 100, "cd" * 32),
    table=manifest.StoredFile(".sha256", 36, "ef" * 32),
    digest="sha256",
    block_size=65536,
    image_size=1000,
    blocks=1,
    changed_blocks=1,
    source=manifest.Source("web1:2222", "/dev/vg/r\udcffoot\n", "device"),
    consistency="live",
    started="2026-11-20T01:00:00+00:00",
    finished="2026-11-20T01:02:03+00:00",
    bytes_read=1000,
    bytes_received=1234,
    versions={"blockdiff": "1.0"},
)


@pytest.mark.parametrize(
    "example",
    [
        EXAMPLE,
        dataclasses.replace(EXAMPLE, parent=None, image_size=None, bytes_read=None, bytes_received=None, versions={}),
        dataclasses.replace(EXAMPLE, parent=manifest.Parent(1, None), source=manifest.Source(None, "/x", "file")),
    ],
)
def test_a_manifest_is_read_as_it_was_written(example: manifest.Manifest) -> None:
    assert manifest.from_bytes(example.to_bytes(), "x") == example


def test_the_file_is_ascii_that_covers_itself() -> None:
    content = EXAMPLE.to_bytes()
    content.decode("ascii")
    claimed = json.loads(content)["sha256"]
    assert hashlib.sha256(content.replace(claimed.encode(), b"0" * 64, 1)).hexdigest() == claimed


def _signed(change: Callable[[dict[str, object]], object]) -> bytes:
    """Return a manifest that is changed and has the right checksum: what only a writer gone wrong would make."""
    fields = json.loads(EXAMPLE.to_bytes())
    change(fields)
    fields["sha256"] = "0" * 64
    blank = json.dumps(fields).encode()
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


FIELDS = [
    *("chain", "generation", "full", "delta_format", "delta", "table", "digest", "block_size", "blocks"),
    *("changed_blocks", "source", "consistency", "started", "finished", "versions"),
]


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("value", [None, [], "missing", -1, True, 1.5])
def test_a_field_that_is_missing_or_of_another_kind_is_refused(name: str, value: object) -> None:
    if (name, value) in (("full", True), *((text, "missing") for text in FIELDS)):
        return

    def change(fields: dict[str, object]) -> None:
        fields[name] = value

    with pytest.raises(DamagedError, match=r"x is damaged: .* is missing or unfit"):
        manifest.from_bytes(_signed(change), "x")
    with pytest.raises(DamagedError, match=r"x is damaged: .* is missing or unfit"):
        manifest.from_bytes(_signed(lambda fields: fields.pop(name)), "x")


def test_another_version_is_refused_in_words_that_help() -> None:
    with pytest.raises(DamagedError, match="x has manifest version 2, this blockdiff knows 1") as caught:
        manifest.from_bytes(_signed(lambda fields: fields.update(blockdiff_manifest=2)), "x")
    assert caught.value.hint == "use a newer one"


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"1", b"null", b"{}", b"[" * 100_000, b'{"blockdiff_manifest": 1}', b'{"sha256": "x"}']
    + [b'{"sha256": "x", "blockdiff_manifest": %s}' % value for value in (b"null", b"Infinity", b"NaN", b"[]", b'""')],
)
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(DamagedError, match="x is not a manifest"):
        manifest.from_bytes(content, "x")


def test_every_flipped_bit_is_found() -> None:
    content = EXAMPLE.to_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError):
            manifest.from_bytes(bytes(changed), "x")


def test_a_chain_has_one_identifier_and_each_generation_knows_its_parents_manifest(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)
    contents = [chain.file(f".{n}.json").read_bytes() for n in (1, 2, 3)]
    found = [manifest.from_bytes(content, "x") for content in contents]
    assert len({each.chain for each in found}) == 1
    assert found[0].parent is None
    for n in (1, 2):
        assert found[n].parent == manifest.Parent(n, hashlib.sha256(contents[n - 1]).hexdigest())


def test_a_manifest_describes_the_files_and_the_image(tmp_path: Path) -> None:
    chain = chains.new_chain(tmp_path)
    chain.add(DAYS[0])
    made = chain.add(DAYS[1]).manifest
    for stored, suffix in ((made.delta, ".2.gz"), (made.table, ".2.sha256")):
        content = chain.file(suffix).read_bytes()
        assert (".2" + stored.suffix, stored.size) == (suffix, len(content))
        assert stored.sha256 == hashlib.sha256(content).hexdigest()
    assert (made.image_size, made.blocks, made.changed_blocks, made.full) == (len(DAYS[1]), 7, 3, False)
    assert made.source == manifest.Source(None, os.fspath(chain.source), "file")
    assert made.started <= made.finished and made.finished.endswith("+00:00")
    assert set(made.versions) >= {"blockdiff", "python", "host_python"}


def test_the_manifest_of_another_number_is_refused(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)
    chain.file(".3.json").write_bytes(chain.file(".2.json").read_bytes())
    error = chain.verdicts()[3]
    assert error is not None and error.message == f"{chain.file('.3.json')} is the manifest of generation 2"
