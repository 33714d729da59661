"""Every byte of a chain is changed, every file cut at every length: it is found, named, and restores nothing wrong."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.shared.errors import BlockdiffError, DamagedError
from tests import chains, commands
from tests.chains import BLOCK, DAYS, SmallChain

pytestmark = [pytest.mark.torture, pytest.mark.timeout(900)]

#: Format, compression, digest; the second is a chain of the original, but for its manifests.
KINDS = [(2, "gzip", "sha256"), (1, "none", "md5")]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind)))
def chain(request: pytest.FixtureRequest, large_tmp_path: Path) -> SmallChain:
    delta_format, compression, digest = request.param
    options = Options(block_size=BLOCK, delta_format=delta_format, compression=compression, digest=digest)
    return chains.three_days(large_tmp_path, options)


def files(chain: SmallChain) -> list[tuple[int, Path]]:
    """Return the files of the chain but for ``NAME.ver``, each with the number of its generation."""
    found = [(int(path.name.split(".")[1]), path) for path in chain.directory.glob(f"{chain.base}.[0-9]*")]
    assert len(found) == 9
    return sorted(found)


def harmed(path: Path) -> Iterator[str]:
    """Let the file be harmed in each way, one after the other, and say how; it is as before at the end."""
    content = path.read_bytes()
    try:
        for offset, byte in enumerate(content):
            path.write_bytes(content[:offset] + bytes([byte ^ 1 << offset % 8]) + content[offset + 1 :])
            yield f"{path.name}: byte {offset} changed"
            path.write_bytes(content[:offset])
            yield f"{path.name}: cut to {offset} bytes"
        path.unlink()
        yield f"{path.name}: gone"
    finally:
        path.write_bytes(content)


def restores(chain: SmallChain, number: int) -> bool:
    """Return whether a generation restores; then it does so exactly.

    One that does not verify may: bytes of a gzip header, say, mean nothing to the image.
    """
    try:
        image = chain.restored(number)
    except BlockdiffError:
        return False
    assert image == DAYS[number - 1]
    return True


def test_whatever_is_harmed_is_found_named_and_hurts_nothing_else(chain: SmallChain) -> None:
    for generation, path in files(chain):
        for how in harmed(path):
            verdicts = chain.verdicts()
            assert sorted(verdicts) == [1, 2, 3], how
            own = verdicts[generation]
            if path == chain.file(".3.json") and not path.exists() and chain.file(".3.md5").exists():
                continue  # the original writes no manifests: nothing tells that there was one
            assert isinstance(own, DamagedError) and str(path) in own.message, (how, own)
            for number, verdict in verdicts.items():
                if number < generation or (number > generation and path.suffix[1:] in ("sha256", "xxh3", "md5")):
                    assert verdict is None, (how, number)
                assert restores(chain, number) or verdict is not None, (how, number)
    chain.assert_sound()


def test_the_command_tells_file_and_generation(chain: SmallChain) -> None:
    for generation, path in files(chain):
        content = path.read_bytes()
        path.write_bytes(content[:-1])
        result = commands.run("blockdiff", "verify", chain.name)
        path.write_bytes(content)
        assert result.returncode == 5
        said = (result.stdout + result.stderr).decode()
        assert str(path) in said and f"generation {generation}" in said, said
