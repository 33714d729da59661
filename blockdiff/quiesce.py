"""Hold writers still while the agent takes the snapshots: by a database lock, by a command, or not at all."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from blockdiff import lockcommand, mysqllock
from blockdiff.coordinates import Coordinates
from blockdiff.errors import SourceError, printable
from blockdiff.grant import ELSEWHERE
from blockdiff.manifest import Quiesced
from blockdiff.mysqlaccount import SOCKETS, Account
from blockdiff.rules import Ready
from blockdiff.session import Session


@dataclass(frozen=True)
class Moment:
    """How the moment of the image was taken, `took_s` seconds long."""

    took_s: float
    quiesced: Quiesced | None = None
    database: Coordinates | None = None


class Quiesce:
    """Nothing but the commands of --before and --after, which the agent runs, holds writers still."""

    #: Places on the host that must lie on the sources of the run.
    directories: Sequence[str] = ()

    def __init__(self, freezes: bool = False) -> None:
        self._freezes = freezes

    def check(self, ready: Ready, session: Session) -> None:
        """Raise `SourceError` where the volumes of the run are not those that hold what is quiesced."""

    def around(self, session: Session) -> Moment:
        """Let the agent take the moment, and return how that went."""
        took_s = _take(session)
        return Moment(took_s, Quiesced("freeze", took_s) if self._freezes else None)


class CommandQuiesce(Quiesce):
    """A command of the user's around it: LVCREATE_PREFIX."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self._command = command

    def around(self, session: Session) -> Moment:
        """See `Quiesce`; raises `ProcessError` where the command does not do its part."""
        took_s, held_s = lockcommand.around(self._command, lambda: _take(session))
        return Moment(took_s, Quiesced("command", held_s))


class DatabaseQuiesce(Quiesce):
    """A database lock."""

    def __init__(self, database: mysqllock.Database, server: mysqllock.Server, freezes: bool) -> None:
        super().__init__(freezes)
        self._database = database
        self._server = server
        self.directories = server.directories

    def check(self, ready: Ready, session: Session) -> None:
        """See `Quiesce`. A database in a guest or a container of the host is nothing that can be checked."""
        if self._server.hostname != session.host["hostname"]:
            return
        places = [
            (directory, device, source)
            for directory, (device, source) in zip(self.directories, ready.places, strict=True)
            if device and not device.startswith("0:")  # of some file systems the kernel does not tell the device
        ]
        elsewhere = [(directory, device) for directory, device, source in places if source is None]
        if elsewhere:
            directory, device = elsewhere[0]
            which = "" if device == ELSEWHERE else f" ({device})"
            raise SourceError(
                f"the database keeps {printable(directory)} on another device{which}, which is not in this run",
                "name its volume as well, with --also NAME=PATH",
            )
        if len({device for _directory, device, _source in places}) > 1 and not self._freezes:
            raise SourceError(
                "the database keeps its files on several volumes, whose snapshots are not made at once",
                # not fsfreeze: device-mapper cannot suspend what is frozen already (Linux before 6.8)
                "stop it meanwhile: --before 'systemctl kill -s STOP mariadb' --after 'systemctl kill -s CONT mariadb'",
            )

    def around(self, session: Session) -> Moment:
        """See `Quiesce`; raises `DatabaseError` where there is no lock, or it did not last."""
        with self._database.locked() as held:
            session.begin_take()
            found = held.coordinates()  # meanwhile: nothing can change them
            took_s = session.end_take()
            held.prove()
            held.release()
        quiesced = Quiesced("mysql", held.held_s, list(held.statements), held.waited_s)
        return Moment(took_s, quiesced, found)


def _take(session: Session) -> float:
    session.begin_take()
    return session.end_take()


@contextmanager
def database(session: Session, account: Account, limits: mysqllock.Limits, freezes: bool) -> Iterator[Quiesce]:
    """Yield what locks a database; leaving ends its session. Raises `DatabaseError`."""
    with ExitStack() as stack:
        sock = None
        if account.through_ssh:
            sockets = SOCKETS if account.socket is None else [account.socket]
            account = replace(account, user=account.user or session.host["user"])
            sock = stack.enter_context(session.tunnel(sockets, port=0))
        found = stack.enter_context(mysqllock.connect(account, limits, sock=sock))
        yield DatabaseQuiesce(found, found.check(), freezes)
