"""Valid input of each parser, written by blockdiff itself or taken from `tests/golden`, for fuzzing to begin with."""

import dataclasses
import io
import json
import struct
from collections.abc import Mapping, Sequence

from blockdiff.format import codec
from blockdiff.format.digesttable import TableWriter
from blockdiff.shared import wire
from blockdiff.shared.blocks import Hasher, digest_named
from blockdiff.shared.wire import Link
from tests.fake_lvm import new_row
from tests.protocol import GOLDEN, example
from tests.test_manifest import EXAMPLE, SNAPSHOT

#: The file that the first byte of a generation's seed says the rest is.
FILES = (".1", ".2", ".2.xxh3", ".1.json", ".2.json", ".ver")

_ROW = {**new_row("vg", "lv", 1 << 30), "lv_uuid": "AbCdEf-0000-0000-0000-0000-0000-000000", "vg_free": str(1 << 33)}
_HEAD = '<superblock uuid="" time="1" transaction="2" data_block_size="128" nr_data_blocks="0">'
_U64 = struct.Struct("<Q")


def _golden(*names: str) -> list[bytes]:
    return [(GOLDEN / name).read_bytes() for name in names]


def deltas() -> list[bytes]:
    """Of both versions."""
    return [
        example("delta-1"),
        example("delta-2"),
        *_golden("own-none.2", "own-none.4", "perl-plain.2", "perl-plain.4"),
    ]


def _members(name: str) -> bytes:
    member = codec.compressor(name)
    return member(example("delta-2")[:41]) + member(example("delta-2")[41:])


def gzip() -> list[bytes]:
    """Members that tell their sizes, and those that do not."""
    return [_members("gzip"), *_golden("own-gzip.4.gz", "perl-gzip.4.gz"), *_golden("perl-gzip.3.gz")]


def zstd() -> list[bytes]:
    """Frames that tell their sizes, and one that does not."""
    return [_members("zstd"), *_golden("own-zstd.4.zst"), _golden("own-zstd.4.zst")[0][12:]]


def lzop() -> list[bytes]:
    """As the program wrote them."""
    return _golden("perl-lzop.3.lzop", "perl-lzop.4.lzop")


def tables() -> list[bytes]:
    """Of both forms, with digests of 16 bytes."""
    hasher, sink = Hasher(digest_named("md5"), 512), io.BytesIO()
    writer = TableWriter(sink, hasher, 20_000)
    writer.append(hasher.zero_digest * 5000 + bytes(16) * 5 + hasher.zero_digest * 14_995)
    writer.finish()
    return [example("table"), sink.getvalue(), *_golden("own-none.2.xxh3", "perl-plain.4.md5")]


def manifests() -> list[bytes]:
    """With and without a snapshot and a database."""
    timeless = dataclasses.replace(SNAPSHOT, notes=[])
    return [EXAMPLE.to_bytes(), SNAPSHOT.to_bytes(), timeless.to_bytes(), *_golden("own-none.1.json")]


def versions() -> list[bytes]:
    """Of the chain that the target uses."""
    return [b"2\n", b"2"]


def generations() -> list[bytes]:
    """Each file of the chain that may be replaced, as it is."""
    return [bytes([i]) + _golden(f"own-none{suffix}")[0] for i, suffix in enumerate(FILES)]


class _Outgoing(wire.Carrier):
    def __init__(self) -> None:
        self.written = b""

    def readinto(self, view: memoryview, timeout_s: float) -> int:
        return 0

    def write(self, parts: Sequence[wire.Buffer]) -> None:
        self.written += b"".join(parts)


Sent = tuple[int, bytes | Mapping[str, object], int]


def _sent(*frames: Sent) -> bytes:
    stream = _Outgoing()
    link = Link(stream, crc32=lambda data, crc: 0)
    for kind, payload, offset in frames:
        link.send(kind, payload if isinstance(payload, bytes) else json.dumps(payload).encode(), offset=offset)
    return stream.written


def frames() -> list[bytes]:
    """What an agent sends of an image of 1 MiB in blocks of 512 bytes."""
    ready = {"sources": [{"uuid": "u", "segtype": "thin"}], "directories": [["8:0", 0]], "notes": ["a note"]}
    ready.update(volumes={"8:1": "/dev/vg/far"}, outside=[["/data/t.MYD", "8:1", None, "/dev/vg/far"]], unlogged=True)
    source = {"size": 1 << 20, "kind": "device", "path": "/dev/vg/bd_1", "snapshot": "u", "extents": "mapped"}
    totals = {"image_size": 1 << 20, "changed_blocks": 2, "read": 1024, "touched": False, "notes": []}
    error = {"type": "SourceError", "message": "no such file", "hint": "look there"}
    return [
        _sent((wire.HELLO, {"protocol": wire.PROTOCOL}, 0), (wire.READY, ready, 0), (wire.TAKEN, b"", 0)),
        _sent(
            (wire.SOURCE, source, 0),
            (wire.WANT, _U64.pack(0), 4096),
            (wire.DATA, bytes(512), 0),
            (wire.ALIVE, b"", 0),
            (wire.ZERO, _U64.pack(512), 1024),
            (wire.PROGRESS, b"", 1 << 20),
            (wire.TOTALS, {**totals, "level_permille": 415, "kept": True}, 0),
            (wire.END, {"notes": []}, 0),
        ),
        _sent((wire.LENT, _U64.pack(0) + _U64.pack(512), 0), (wire.ERROR, error, 0)),
    ]


def reports() -> list[bytes]:
    """What lvs prints of plain volumes, and of a thick snapshot's origin with segments."""
    rows = [_ROW, {**_ROW, "lv_name": "bd_1", "origin": "[lv]", "lv_tags": "blockdiff", "data_percent": "1.50"}]
    return [
        json.dumps({"report": [{"lv": [_ROW]}]}).encode(),
        json.dumps({"report": [{"seg": [rows[1], rows[0]]}]}).encode(),
    ]


def thin_deltas() -> list[bytes]:
    """What thin_delta prints of a volume of 16 blocks of 64 KiB."""
    ranges = '<same begin="0" length="3"/><different begin="3" length="1"/><left_only begin="5" length="2"/>'
    document = f'{_HEAD}<diff left="2" right="3">{ranges}<right_only begin="9" length="1"/></diff></superblock>'
    return [document.encode(), b'<?xml version="1.0" encoding="utf-8"?>\n' + document.encode()]


def options() -> list[bytes]:
    """What is in a my.cnf."""
    return [
        b"# all\n[client]\nuser = backup\npassword='it\\'s # \"x\"'\n[mysqld]\nport=1\n[client-mariadb]\nloose-ssl\n",
        b"!include /nonexistent/a.cnf\n[client]\nsocket=/run/mysqld/mysqld.sock # there\nhost=\xff\n",
    ]


def sources() -> list[bytes]:
    """Words of a command line."""
    return [b"/dev/vg/lv", b"root@web1:/dev/vg/lv", b"ssh://root@[::1]:2222/dev/a%20b", b"ssh://web1/x"]


def known_hosts() -> list[bytes]:
    """Return lines of known_hosts."""
    return [
        b"[web1]:2222,web? ssh-ed25519 AAAA\n@revoked *,!web2 ssh-rsa AAAA a comment\r\n",
        b"# caf\xe9\n|1|AAAAAAAAAAAAAAAAAAAAAAAAAAA=|AAAAAAAAAAAAAAAAAAAAAAAAAAA= ssh-ed25519 AAAA\n",
    ]


def public_keys() -> list[bytes]:
    """What ssh-keygen makes, and a key with a comment around it."""
    key = b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHrRmsdBkJpJxybvBclk0WSnIijZzu6AWIeZNtkpEmMk"
    return [key + b" root@web1\n", b"# the server's\r\n\r\n\t" + key + b"\r\n"]
