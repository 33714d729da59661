"""Manifests: what they say, that they say it the same way when read again, and what is refused."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from blockdiff.database.coordinates import Channel, Coordinates
from blockdiff.format import manifest
from blockdiff.shared.errors import ChainError, DamagedError
from tests import chains
from tests.chains import DAYS

EXAMPLE = manifest.Manifest(
    chain="0123456789abcdef",
    generation=2,
    parent=manifest.Parent(1, "ab" * 32),
    full=False,
    delta_format=2,
    delta=manifest.StoredFile(".gz", 100, "xxh3:" + "cd" * 16),
    table=manifest.StoredFile(".sha256", 36, "sha256:" + "ef" * 32),
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

EXAMPLES = {name: dataclasses.asdict(stored) for name, stored in (("delta", EXAMPLE.delta), ("table", EXAMPLE.table))}

CHANNEL = Channel("", "db99", 3306, "binlog.000009", 4, None)
COORDINATES = Coordinates("10.11.2-MariaDB", "mariadb", "binlog.000001", 930, "0-1-4", (CHANNEL,))
THICK = manifest.SnapshotRecord("GhIjKl-1111", "thick", 0.25, 41.5, False, None)
SNAPSHOT = dataclasses.replace(
    EXAMPLE,
    source=manifest.Source("web1", "/dev/vg/root", "device", "AbCdEf-0000"),
    consistency="quiesced",
    run="0123456789abcdef",
    snapshot=THICK,
    quiesced=manifest.Quiesced("mysql", 0.5, ["BACKUP STAGE START"], 1.25),
    database=COORDINATES,
    notes=["something \u2028 else"],
)


@pytest.mark.parametrize(
    "example",
    [
        EXAMPLE,
        SNAPSHOT,
        dataclasses.replace(
            SNAPSHOT,
            snapshot=manifest.SnapshotRecord("GhIjKl-1111", "thin", 2.0, None, True, "changed"),
            quiesced=manifest.Quiesced("freeze", 3.0),
            database=Coordinates("8.4.3", "mysql", None, None, None, ()),
        ),
        dataclasses.replace(EXAMPLE, parent=None, image_size=None, bytes_read=None, bytes_received=None, versions={}),
        dataclasses.replace(EXAMPLE, parent=manifest.Parent(1, None), source=manifest.Source(None, "/x", "file")),
    ],
)
def test_a_manifest_is_read_as_it_was_written(example: manifest.Manifest) -> None:
    assert manifest.from_bytes(example.to_bytes(), "x") == example


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"database": dataclasses.replace(COORDINATES, gtid="1" * (16 << 20))}, "it has 1677.... bytes, 16777216 at"),
        ({"bytes_read": 1 << 63}, "it is damaged: bytes_read is missing or not valid"),
        ({"snapshot": dataclasses.replace(THICK, took_s=-1.0)}, "it is damaged: took_s is missing or not valid"),
        ({"notes": ("a",)}, "it would be read differently"),
        ({"notes": [1]}, "it is damaged: notes is missing or not valid"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(changes: "dict[str, object]", message: str) -> None:
    with pytest.raises(ChainError, match=f"the manifest of generation 2 could not be read again: {message}"):
        dataclasses.replace(SNAPSHOT, **changes).to_bytes()  # type: ignore[arg-type]  # what no type checker lets pass


def test_the_file_is_ascii_that_covers_itself() -> None:
    content = EXAMPLE.to_bytes()
    content.decode("ascii")
    claimed = json.loads(content)["sha256"]
    assert hashlib.sha256(content.replace(claimed.encode(), b"0" * 64, 1)).hexdigest() == claimed


def _signed(change: Callable[[dict[str, object]], object], example: manifest.Manifest = EXAMPLE) -> bytes:
    """Return a manifest that is changed and has the right checksum: what only a writer gone wrong would make."""
    fields = json.loads(example.to_bytes())
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

    with pytest.raises(DamagedError, match=r"x is damaged: .* is missing or not valid"):
        manifest.from_bytes(_signed(change), "x")
    with pytest.raises(DamagedError, match=r"x is damaged: .* is missing or not valid"):
        manifest.from_bytes(_signed(lambda fields: fields.pop(name)), "x")


@pytest.mark.parametrize(
    ("holder", "name", "values"),
    [
        ("source", "volume", [7, [], True]),
        ("snapshot", "uuid", [None, 7]),
        ("snapshot", "kind", [None, []]),
        ("snapshot", "took_s", [None, "1", -1, -0.5, True, float("inf"), float("nan")]),
        ("snapshot", "fill_percent", ["1", -1, -0.5, True]),
        ("snapshot", "kept", [None, 1, "yes"]),
        ("snapshot", "extents", [1, []]),
        ("quiesced", "by", [None, 1]),
        ("quiesced", "held_s", [None, "1", -0.5]),
        ("quiesced", "statements", [None, "BACKUP STAGE START", {}]),
        ("quiesced", "waited_s", ["1", -0.5]),
        ("database", "server_version", [None, 1]),
        ("database", "flavour", [None, "oracle"]),
        ("database", "binlog_position", [None, -1, "4"]),
        ("database", "replica_channels", [None, {}, [1]]),
        ("database", "gtid", [5]),
        ("", "snapshot", [[], 1, "x", True]),
        ("", "quiesced", [[], 1, "x"]),
        ("", "database", [[], 1, "x"]),
        ("", "run", [1, []]),
        ("", "notes", [1, "x", {}]),
    ],
)
def test_what_is_told_of_snapshot_and_lock_is_whole_or_refused(holder: str, name: str, values: list[object]) -> None:
    for value in values:

        def change(fields: dict[str, object], value: object = value) -> None:
            place = fields[holder] if holder else fields
            assert isinstance(place, dict)
            assert name in place
            place[name] = value

        with pytest.raises(DamagedError, match=r"^x is damaged: .* is missing or not valid$"):
            manifest.from_bytes(_signed(change, SNAPSHOT), "x")


@pytest.mark.parametrize("name", ["run", "snapshot", "quiesced", "database", "notes"])
def test_what_older_manifests_do_not_tell_is_not_known(name: str) -> None:
    expected: object = [] if name == "notes" else None
    assert getattr(manifest.from_bytes(_signed(lambda fields: fields.pop(name), SNAPSHOT), "x"), name) == expected


def test_another_version_is_refused_in_words_that_help() -> None:
    with pytest.raises(DamagedError, match="x has manifest version 3, this blockdiff knows 1 to 2") as caught:
        manifest.from_bytes(_signed(lambda fields: fields.update(blockdiff_manifest=3)), "x")
    assert caught.value.hint == "use a newer one"


def test_version_1_has_a_sha256_of_both_files() -> None:
    def age(fields: dict[str, object]) -> None:
        fields["blockdiff_manifest"] = 1
        for name, digits in (("delta", "cd" * 32), ("table", "ef" * 32)):
            stored = fields[name]
            assert isinstance(stored, dict)
            del stored["checksum"]
            stored["sha256"] = digits

    delta = manifest.StoredFile(".gz", 100, "sha256:" + "cd" * 32)
    assert manifest.from_bytes(_signed(age), "x") == dataclasses.replace(EXAMPLE, delta=delta)


@pytest.mark.parametrize(
    "checksum", ["", "sha256", "sha256:", "md5:" + "0" * 32, "xxh3:" + "0" * 31 + "G", "xxh3:" + "0" * 64]
)
@pytest.mark.parametrize("name", ["delta", "table"])
def test_a_checksum_that_makes_no_sense_is_refused(name: str, checksum: str) -> None:
    def change(fields: dict[str, object]) -> None:
        fields[name] = {**EXAMPLES[name], "checksum": checksum}

    with pytest.raises(DamagedError, match=r"^x is damaged: checksum is missing or not valid$"):
        manifest.from_bytes(_signed(change), "x")


def test_a_table_that_is_not_known_by_its_sha256_is_refused() -> None:
    def change(fields: dict[str, object]) -> None:
        fields["table"] = {**EXAMPLES["table"], "checksum": "xxh3:" + "0" * 32}

    with pytest.raises(DamagedError, match=r"^x is damaged: checksum is missing or not valid$"):
        manifest.from_bytes(_signed(change), "x")


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
    delta, table = (chain.file(suffix).read_bytes() for suffix in (".2.gz", ".2.sha256"))
    assert made.delta == manifest.StoredFile(".gz", len(delta), f"xxh3:{xxhash.xxh3_128_hexdigest(delta)}")
    assert made.table == manifest.StoredFile(".sha256", len(table), f"sha256:{hashlib.sha256(table).hexdigest()}")
    assert (made.image_size, made.blocks, made.changed_blocks, made.full) == (len(DAYS[1]), 7, 3, False)
    assert made.source == manifest.Source(None, os.fspath(chain.source), "file")
    assert made.started <= made.finished and made.finished.endswith("+00:00")
    assert set(made.versions) >= {"blockdiff", "python", "host_python"}


def test_the_manifest_of_another_number_is_refused(tmp_path: Path) -> None:
    chain = chains.three_days(tmp_path)
    chain.file(".3.json").write_bytes(chain.file(".2.json").read_bytes())
    error = chain.verdicts()[3]
    assert error is not None and error.message == f"{chain.file('.3.json')} is the manifest of generation 2"
