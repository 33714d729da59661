"""Stop the SQL thread of a replica for the moment of a backup, and start it again even if this process dies.

The database does not start it again when a session ends. So a separate process, the guard, logs in over its own
connection before anything is stopped, and waits until its standard input is closed: we close it when the SQL thread may
start again, and the system closes it if we die. Then the guard starts the channels that were stopped. It does not
survive a crash of this machine; a database server that is restarted starts its SQL threads itself.
"""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

from blockdiff import mysqllock
from blockdiff.database.accounts import SOCKETS, Account, Tls
from blockdiff.mysqllock import Limits
from blockdiff.session.session import Session
from blockdiff.shared import process
from blockdiff.shared.errors import BlockdiffError, DatabaseError, printable
from blockdiff.transport.address import Address

#: How long the guard may take to log in, and to start the channels that were stopped, in seconds.
READY_S = 90.0
START_S = 60.0
#: How long a guard lives at most, in seconds: longer than we may wait for a lock and hold it.
LIFE_S = 3600
_READY = b"ready\n"
_STARTED = b"started\n"
# isolated (-I): neither the environment nor the current directory changes what it imports
_PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import guard; guard()"


@dataclass(frozen=True)
class Way:
    """How to connect to the host for another session: see `session.Session`."""

    address: Address
    transport: str | None = None
    options: Sequence[str] = ()
    prefix: Sequence[str] = ()


@contextmanager
def paused(account: Account, way: Way, database: mysqllock.Database, channels: Sequence[str]) -> Iterator[None]:
    """Stop the SQL threads of `channels` within the `with` statement.

    Raises `DatabaseError` if they cannot be stopped, or cannot be started again; nothing is stopped without a guard.
    """
    with _guard(account, way, channels) as child:
        try:
            database.stop_appliers(channels)
            yield
        finally:
            _start(child, database, channels)


@contextmanager
def _guard(account: Account, way: Way, channels: Sequence[str]) -> Iterator["subprocess.Popen[bytes]"]:
    """Yield a guard that has logged in. It is never killed: it ends when it has done its work."""
    order = {"account": asdict(account), "way": asdict(way), "channels": list(channels)}

    def start() -> "subprocess.Popen[bytes]":
        places = json.dumps([path for path in sys.path if os.path.isabs(path)])
        command = [sys.executable, "-I", "-c", _PROGRAM, places]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    with process.started(start, _let_go) as child:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(order).encode("ascii") + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; its message is read below
        said = _answer(child, READY_S)
        if said != _READY:
            raise DatabaseError(
                f"nothing was stopped: what would start the SQL thread again cannot log in: {_words(said)}",
                "--replica-pause logs in twice, and over SSH it connects twice",
            )
        yield child


def _let_go(child: "subprocess.Popen[bytes]") -> None:
    if child.stdin is not None:
        child.stdin.close()
    try:
        child.wait(START_S)
    except subprocess.TimeoutExpired:
        pass  # it continues to try, and ends later without us


def _start(child: "subprocess.Popen[bytes]", database: mysqllock.Database, channels: Sequence[str]) -> None:
    """Let the guard start the channels that were stopped; if it cannot, start them here."""
    assert child.stdin is not None
    try:
        child.stdin.close()
    except OSError:
        pass  # it has ended too early
    said = _answer(child, START_S)
    if said == _STARTED:
        return
    try:
        database.start_appliers(channels)
    except DatabaseError as error:
        raise DatabaseError(
            f"the replica's SQL thread is stopped and could not be started again: {error.message}",
            "execute START SLAVE (or START REPLICA) there now",
        ) from error


def _answer(child: "subprocess.Popen[bytes]", timeout_s: float) -> bytes:
    """Return the next line of the guard; empty if it has written nothing after `timeout_s` seconds."""
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], timeout_s)
    return child.stdout.readline() if ready else b""


def _words(said: bytes) -> str:
    return printable(said.decode("utf-8", "replace").strip(), 500) or "it says nothing"


def guard() -> None:
    """Run as the guard: log in as standard input says; when it is closed, start the channels that were stopped."""
    signal.alarm(LIFE_S)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    order = json.loads(sys.stdin.buffer.readline())
    account, way = order["account"], order["way"]
    tls = Tls(**account.pop("tls")) if account["tls"] is not None else None
    account = Account(**{**account, "tls": tls})
    try:
        with ExitStack() as stack:
            sock = None
            if account.through_ssh:
                address = Address(**way["address"])
                session = stack.enter_context(Session(address, way["transport"], way["options"], way["prefix"]))
                sockets = SOCKETS if account.socket is None else [account.socket]
                sock = stack.enter_context(session.tunnel(sockets, port=0))
            database = stack.enter_context(mysqllock.connect(account, Limits(max_hold_s=LIFE_S), sock=sock))
            database.stay(LIFE_S)
            os.write(1, _READY)
            sys.stdin.buffer.read()
            database.start_appliers(order["channels"])
            os.write(1, _STARTED)
    except BrokenPipeError:
        pass  # the parent has ended
    except BlockdiffError as error:
        os.write(1, error.message.encode("utf-8", "backslashreplace") + b"\n")
