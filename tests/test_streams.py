"""Several connections that read one source together give what one would, or fail as one would."""

import itertools
import os
import random
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdiff import backup
from blockdiff.session import session, streams
from blockdiff.session.requests import RunRequest, ScanRequest, SourceRequest
from blockdiff.session.rules import Opened
from blockdiff.session.session import Session
from blockdiff.shared.blocks import digest_named
from blockdiff.shared.errors import ProtocolError, SourceError
from blockdiff.shared.extents import DATA, SAME, ZEROS, Extent, striped
from blockdiff.shared.runs import Run
from blockdiff.transport import NAMES
from blockdiff.transport.address import Address, parse
from tests import chains, commands, processes
from tests.conftest import require
from tests.mariadb import wait_for
from tests.sshd import Sshd

MIB = 1 << 20
BLOCK = 64 << 10
NOISE = random.Random(4)


@pytest.fixture
def chain(tmp_path: Path) -> chains.SmallChain:
    return chains.new_chain(tmp_path)


def sparse_image(path: Path) -> None:
    """Noise, a hole, noise in the middle of a hole, zeros that are written, and a tail."""
    with path.open("wb") as file:
        file.write(NOISE.randbytes(9 * MIB))
        file.seek(21 * MIB + 5)
        file.write(b"island")
        file.seek(30 * MIB)
        file.write(bytes(5 * MIB) + NOISE.randbytes(3 * MIB) + b"tail")


def change(path: Path) -> None:
    with path.open("r+b") as file:
        for offset in (0, 2 * MIB - 1, 7 * MIB, 15 * MIB, 21 * MIB, 37 * MIB):
            file.seek(offset)
            file.write(b"changed")


@given(
    lengths=st.lists(st.tuples(st.integers(1, 50), st.sampled_from([DATA, ZEROS, SAME])), min_size=1, max_size=12),
    length=st.integers(1, 20),
    count=st.integers(1, 5),
)
def test_every_stretch_has_one_stream_that_examines_it(lengths: list[tuple[int, str]], length: int, count: int) -> None:
    ends = list(itertools.accumulate(size for size, _state in lengths))
    whole = [Extent(end - size, end, state) for (size, state), end in zip(lengths, ends)]
    shares = [list(striped(whole, length, index, count)) for index in range(count)]
    for share in shares:
        assert share[0].start == 0 and share[-1].end == ends[-1]
        assert all(before.end == after.start for before, after in itertools.pairwise(share))
    for extent in whole:
        for offset in range(extent.start, extent.end):
            seen = [state for share in shares for start, end, state in share if start <= offset < end]
            others = [SAME] * (count - 1)
            assert sorted(seen) == sorted([extent.state, *others])


@pytest.mark.parametrize("count", [2, 3, 7])
def test_the_generations_are_those_of_one_stream(chain: chains.SmallChain, count: int) -> None:
    alone = chains.SmallChain(chain.directory, chain.source, "alone")
    for step in (sparse_image, change, change):
        step(chain.source)
        results = [
            each.add(options=backup.Options(streams=number)).manifest for each, number in ((chain, count), (alone, 1))
        ]
        together, single = results
        assert together.table == single.table
        assert (together.bytes_read, together.changed_blocks) == (single.bytes_read, single.changed_blocks)
        assert together.consistency == single.consistency
    chain.assert_sound()


@pytest.mark.parametrize("transport", NAMES)
def test_over_ssh(sshd: Sshd, transport: str, chain: chains.SmallChain) -> None:
    for number, step in enumerate((sparse_image, change), 1):
        step(chain.source)
        words = ("--streams", "3", "--transport", transport, *sshd.arguments)
        commands.done("blockdiff", "backup", chain.name, *words, sshd.url(chain.source))
        assert chain.restored(number) == chain.source.read_bytes()
    processes.wait_until_gone(sshd.mark)


@pytest.mark.parametrize("which", ["first", "last"])
def test_an_agent_that_is_killed_ends_the_run(sshd: Sshd, chain: chains.SmallChain, which: str) -> None:
    chain.source.write_bytes(NOISE.randbytes(60 * MIB))  # 20 s for each stream
    words = ("--streams", "3", "--bwlimit", "3M", *sshd.arguments)

    def agents() -> list[int]:
        marked = processes.marked(sshd.mark)
        return sorted(pid for pid, line in marked.items() if "blockdiff-agent" in line and "sh -c" not in line)

    processes.wait_until_gone(sshd.mark)
    with commands.started("blockdiff", "backup", chain.name, *words, sshd.url(chain.source)) as process:
        delta = chain.directory
        wait_for(lambda: any(path.stat().st_size > 100_000 for path in delta.glob(".disk.1.*.tmp")), "data", 60)
        found = agents()
        os.kill(found[0] if which == "first" else found[-1], signal.SIGKILL)
        said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1 and "lost the agent" in said and "Traceback" not in said, said
    assert chain.last() == 0 and chain.temporary() == []
    processes.wait_until_gone(sshd.mark)


@pytest.mark.parametrize("transport", NAMES)
def test_what_sshd_does_not_take_at_once_is_tried_again(
    tmp_path: Path, chain: chains.SmallChain, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`MaxStartups`: as long as somebody stands at the login, nobody else gets there."""
    require(Sshd.available(), "the programs sshd, ssh and ssh-keygen")
    (tmp_path / "sshd").mkdir()
    sparse_image(chain.source)
    with Sshd(tmp_path / "sshd", ["MaxStartups 1"]) as server:
        others: list[socket.socket] = []

        def at_the_login() -> bool:
            for before in others:  # sshd may not have seen yet that it is gone
                before.close()
            others[:] = [socket.create_connection(("127.0.0.1", server.port))]
            return others[0].recv(4) == b"SSH-"

        wait_for(at_the_login, "a place at the login", 30)
        pauses: list[float] = []

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            others[0].close()
            time.sleep(seconds)

        monkeypatch.setattr(session, "time", SimpleNamespace(sleep=pause, monotonic=time.monotonic))
        options = backup.Options(transport=transport, ssh_options=server.options, streams=2)
        result = backup.backup(chain.name, parse(server.url(chain.source)), options)
    assert pauses[0] == streams.PAUSES_S[0]
    (note,) = [note for note in result.notes if "MaxStartups" in note]
    assert note.startswith("the host refused ") and "use fewer --streams" in note
    assert chain.restored() == chain.source.read_bytes()


def test_streams_that_find_different_sizes_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sparse_image(source)

    def later() -> Session:
        os.truncate(source, source.stat().st_size + MIB)
        return Session(Address(None, str(source)))

    with Session(Address(None, str(source))) as main:
        main.prepare(RunRequest([SourceRequest(os.fsencode(source))]))
        main.begin_take()
        main.end_take()
        scan = ScanRequest(BLOCK, digest_named("sha256"), streams=2)
        refused = pytest.raises(SourceError, match="source changed while several streams opened it")
        with refused as caught, streams.opened(main, scan, str(source), later):
            pass
    assert caught.value.hint == "run again"


def test_a_stream_that_cannot_connect_fails_the_run_and_the_others_end(sshd: Sshd, chain: chains.SmallChain) -> None:
    sparse_image(chain.source)
    marker = chain.source.with_name("first")
    once = f"#!/bin/sh\nmkdir '{marker}' || exit 1\nexec /bin/sh -c \"$SSH_ORIGINAL_COMMAND\"\n"
    options = [word for option in sshd.login_through(once) for word in ("--ssh-option", option)]
    result = commands.run("blockdiff", "backup", chain.name, "--streams", "3", *options, sshd.url(chain.source))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"Traceback" not in result.stderr
    assert chain.last() == 0 and chain.temporary() == []
    processes.wait_until_gone(sshd.mark)


class _Told(Session):
    """A session whose agent sends the given runs."""

    def __init__(self, *runs: Run) -> None:
        super().__init__(Address(None, "/x"))
        self._runs = runs

    def changes(
        self,
        scan: ScanRequest,
        image_size: int,
        allocate: Callable[[int], memoryview],
        progress: Callable[[int], object] = lambda offset: None,
    ) -> Iterator[Run]:
        yield from self._runs


def test_agents_that_send_the_same_block_break_the_protocol() -> None:
    opened = Opened(8 * BLOCK, "file", "", None, None)
    scan = ScanRequest(BLOCK, digest_named("sha256"), streams=2)
    told = [_Told(Run(0, 2 * BLOCK, None)), _Told(Run(BLOCK, BLOCK, None))]
    with pytest.raises(ProtocolError, match="two agents sent the same block"):
        list(streams.Streams(told, scan, opened).changes(lambda length: memoryview(bytearray(length))))


def test_streams_and_kept_snapshots_do_not_go_together(chain: chains.SmallChain) -> None:
    chain.source.write_bytes(b"x")
    words = ("--lvm", "--keep-snapshot", "--streams", "2")
    result = commands.run("blockdiff", "backup", chain.name, *words, str(chain.source))
    assert result.returncode == 2
    assert b"--streams cannot be combined with --keep-snapshot" in result.stderr
