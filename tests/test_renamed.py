"""`blockdiff repair --source`: a chain goes on with a source that has another name now, and remembers the old one."""

import json
from pathlib import Path

import pytest

from blockdiff.backup import Options
from blockdiff.format import manifest
from blockdiff.format.manifest import Manifest
from tests import chains, commands
from tests.chains import BLOCK, DAYS, SmallChain


@pytest.fixture
def chain(tmp_path: Path) -> SmallChain:
    """A chain of two days, whose source lies somewhere else now."""
    chain = chains.some_days(tmp_path, 2)
    chain.source = chain.source.rename(chain.source.with_name("renamed"))
    return chain


def known(chain: SmallChain, number: int) -> Manifest:
    path = chain.file(f".{number}.json")
    return manifest.from_bytes(path.read_bytes(), str(path))


def refused(status: int, *words: str | Path) -> str:
    result = commands.run("blockdiff", *words)
    assert (result.returncode, result.stdout) == (status, b""), result
    return result.stderr.decode()


def test_a_chain_goes_on_with_a_source_that_was_renamed(chain: SmallChain) -> None:
    was = str(chain.source.with_name("source"))
    words = ("backup", chain.name, chain.source)
    assert "blockdiff repair NAME --source SOURCE" in refused(1, *words)
    before = chain.files()
    told = commands.done("blockdiff", "repair", chain.name, "--source", chain.source).decode()
    assert told == f"{chain.file('.2.json')} says that the source is {chain.source} now, and was {was}\n"
    after = chain.files()
    assert after.pop("disk.2.json.aside-1") == before["disk.2.json"]  # what was there is still there
    assert {name for name in before if before[name] != after[name]} == {"disk.2.json"}
    source = known(chain, 2).source
    assert (source.path, source.was, known(chain, 1).source.path) == (str(chain.source), was, was)
    commands.done("blockdiff", *words)
    assert (known(chain, 3).source.path, known(chain, 3).source.was) == (str(chain.source), None)
    assert not known(chain, 3).full
    chain.images[3] = DAYS[1]
    chain.assert_sound()
    assert commands.done("blockdiff", "repair", chain.name) == b""  # and there is nothing to put in order


def test_done_again_there_is_nothing_to_do(chain: SmallChain) -> None:
    commands.done("blockdiff", "repair", chain.name, "--source", chain.source)
    after = chain.files()
    assert commands.done("blockdiff", "repair", chain.name, "--source", chain.source) == b""
    assert chain.files() == after


def test_the_lv_uuid_stays_and_a_host_is_taken_as_it_is_written(chain: SmallChain) -> None:
    commands.done("blockdiff", "repair", chain.name, "--source", "ssh://root@web2.example:2222/dev/vg/web")
    commands.done("blockdiff", "repair", chain.name, "--source", "root@web3:/dev/vg/web")
    source = known(chain, 2).source
    assert (source.host, source.path, source.was) == ("web3", "/dev/vg/web", "web2.example:2222:/dev/vg/web")
    (listed,) = json.loads(commands.done("blockdiff", "list", "--json", f"{chain.name}@2"))
    assert listed["source"] == "web3:/dev/vg/web"


def test_a_dry_run_only_says_so(chain: SmallChain) -> None:
    before = chain.files()
    told = commands.done("blockdiff", "repair", chain.name, "--dry-run", "--source", chain.source).decode()
    assert told.startswith(f"would be done: {chain.file('.2.json')} says that the source is {chain.source} now")
    found = json.loads(
        commands.done("blockdiff", "repair", "--json", chain.name, "--dry-run", "--source", chain.source)
    )
    assert found["dry_run"] is True and "would be done: " + found["deeds"][0] + "\n" == told
    assert chain.files() == before


def test_what_cannot_be_renamed_is_told(chain: SmallChain, tmp_path: Path) -> None:
    where = ("--source", "web:/x")
    assert "there is no chain" in refused(1, "repair", f"{chain.name}2", *where)
    assert "cannot understand the source" in refused(2, "repair", chain.name, "--source", "http://web/x")
    chain.file(".2.json").write_bytes(b"damaged")
    assert "is not a manifest" in refused(5, "repair", chain.name, *where)
    (tmp_path / "new").mkdir()
    original = chains.some_days(tmp_path / "new", 1, Options(block_size=BLOCK, digest="md5", delta_format=1))
    chains.without_manifests(original)
    assert "does not name a source" in refused(1, "repair", original.name, *where)
