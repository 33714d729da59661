"""An sshd that renews the keys of a connection all the time does no harm: no data is lost, over either transport."""

import filecmp
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff import backup
from blockdiff.chain.generations import Chain
from blockdiff.transport import NAMES, address
from tests import chains, commands
from tests.conftest import LARGE, require
from tests.sshd import Sshd

LARGE_BYTES = 2 << 30
CHUNK = 64 << 20
BLOCK = 1 << 20


def often(directory: Path, limit: str) -> Sshd:
    """Return an sshd that renews the keys whenever `limit` bytes have passed, and logs that it does."""
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    directory.mkdir()
    return Sshd(directory, extra=[f"RekeyLimit {limit}", "LogLevel DEBUG1"])


def renewals(sshd: Sshd) -> int:
    """Return how often the sshd has begun to exchange keys so far, the first time of each connection included."""
    return sshd.log().count("SSH2_MSG_KEXINIT sent")


@pytest.fixture(scope="module")
def large_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, bytes]]:
    """An image without two equal blocks, none of which can be compressed, and the digests of its blocks."""
    place = Path(tempfile.mkdtemp(prefix="blockdiff-", dir=LARGE or tmp_path_factory.mktemp("large")))
    try:
        chunk = bytearray(os.urandom(CHUNK))
        digests = []
        with (place / "image").open("wb") as file:
            for start in range(0, LARGE_BYTES, CHUNK):
                for offset in range(0, CHUNK, BLOCK):
                    chunk[offset : offset + 8] = (start + offset).to_bytes(8, "little")
                    digests.append(hashlib.sha256(memoryview(chunk)[offset : offset + BLOCK]).digest())
                file.write(chunk)
        yield place / "image", b"".join(digests)
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize("transport", NAMES)
def test_two_gigabytes_arrive_complete(
    large_image: tuple[Path, bytes], large_tmp_path: Path, tmp_path: Path, transport: str
) -> None:
    """The digests in the new table are computed from what arrived: they are those of the image itself."""
    path, digests = large_image
    name = str(large_tmp_path / "disk")
    with often(tmp_path / "sshd", "32M") as sshd:
        options = backup.Options(block_size=BLOCK, compression="none", transport=transport, ssh_options=sshd.options)
        result = backup.backup(name, address.parse(sshd.url(path)), options)
        assert renewals(sshd) > LARGE_BYTES // (32 << 20) // 2
    assert result.manifest.bytes_received is not None and result.manifest.bytes_received > LARGE_BYTES
    with Chain(name) as chain, chain.generation(1).open_table() as table:
        assert table.count == LARGE_BYTES // BLOCK
        assert table.digests(0, table.count) == digests


@pytest.mark.parametrize("transport", NAMES)
def test_keys_that_change_all_the_time_break_no_run(tmp_path: Path, transport: str) -> None:
    """Both directions are busy: a full run sends data up, an incremental one with tiny blocks its table down."""
    chain = chains.new_chain(tmp_path)
    with often(tmp_path / "sshd", "1M") as sshd:
        for number in range(1, 9):
            full = number % 2 == 1
            options = backup.Options(block_size=256, transport=transport, ssh_options=sshd.options, full=full)
            if full:
                chain.source.write_bytes(os.urandom(8 << 20))
            result = backup.backup(chain.name, address.parse(sshd.url(chain.source)), options)
            assert result.manifest.changed_blocks == (result.manifest.blocks if full else 0)
        assert renewals(sshd) > 4 * 6
    assert chain.bad() == []
    commands.done("blockdiff", "restore", chain.name, tmp_path / "restored")
    assert filecmp.cmp(tmp_path / "restored", chain.source, shallow=False)
