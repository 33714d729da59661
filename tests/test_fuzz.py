"""Every parser, fed with anything: what it promises or a typed error, and nothing else (`make fuzz` goes on)."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blockdiff.shared.errors import ConnectionLost
from tests.conftest import require_program
from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

CRASHERS = Path(__file__).parent / "fuzz" / "crashers"
#: Those that start a program or read a whole chain, and the examples that there is time for; of others there are more.
SLOW = {"lzop": 15, "generation": 40, "version": 100}
EXAMPLES = 200
#: Where each target's parser is at its deepest with a valid input.
DEEPEST = {
    "delta": "blockdiff.format.deltafile.DeltaReader._read_end",
    "salvager": "blockdiff.format.deltafile.Salvager._record_2",
    "gzip": "blockdiff.format.codec._sized_gzip",
    "zstd": "blockdiff.format.codec._zstd_stream",
    "lzop": "blockdiff.format.lzop.pieces",
    "table": "blockdiff.format.digesttable._Sparse.stored_digests",
    "manifest": "blockdiff.database.coordinates._channel_from_fields",
    "version": "blockdiff.chain.generations.Chain.spans",
    "generation": "blockdiff.format.digesttable.TableReader.digests",
    "frames": "blockdiff.session.rules.printable",
    "lvs": "blockdiff.host.lvcheck.size_in_bytes",
    "thin_delta": "blockdiff.shared.extents.aligned",
    "options": "blockdiff.database.optionfiles._without_comment",
    "source": "blockdiff.transport.address._split_port",
    "publickey": "blockdiff.transport.publickey._is_key",
    "known_hosts": "blockdiff.transport.knownhosts._entries",
}

NAMES = list(TARGETS)


@pytest.fixture(autouse=True)
def programs(request: pytest.FixtureRequest) -> None:
    if "lzop" in request.node.name:
        require_program("lzop")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_valid_is_taken(name: str) -> None:
    for seed in TARGETS[name].seeds():
        if name == "frames":  # a conversation that ends is a lost connection
            with pytest.raises(ConnectionLost, match="ended"):
                TARGETS[name].parse(seed)
        else:
            TARGETS[name].parse(seed)


@pytest.mark.parametrize("name", NAMES)
def test_mutations(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=SLOW.get(name, EXAMPLES), suppress_health_check=list(HealthCheck))
    @given(mutated(target.seeds()))
    def feed(data: bytes) -> None:
        target(data)

    feed()


@pytest.mark.parametrize("name", NAMES)
def test_anything(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=SLOW.get(name, EXAMPLES) // 3)
    @given(st.binary(max_size=200))
    def feed(data: bytes) -> None:
        target(data)

    feed()


@pytest.mark.parametrize("path", sorted(CRASHERS.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name}")
def test_what_once_crashed_a_parser(path: Path) -> None:
    TARGETS[path.parent.name](path.read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_target_fails_where_its_parser_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: object, **options: object) -> None:
        raise IndexError("a fault of the parser")

    target = TARGETS[name]
    seeds = target.seeds()
    monkeypatch.setattr(DEEPEST[name], fault)
    with pytest.raises(IndexError, match="a fault of the parser"):
        for seed in seeds:
            target(seed)
