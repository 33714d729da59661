"""Stop writers while the agent takes the snapshots: with a database lock, with a command, or not at all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

from blockdiff import mysqllock, replicapause
from blockdiff.database.accounts import SOCKETS, Account
from blockdiff.database.coordinates import Coordinates
from blockdiff.format.manifest import Quiesced
from blockdiff.original import lockcommand
from blockdiff.session.rules import Outside, Ready
from blockdiff.session.session import Session
from blockdiff.shared.errors import SourceError, printable
from blockdiff.shared.grant import ELSEWHERE

#: How many places an error names at most.
_SHOWN = 20
#: Why a generation has no coordinates.
_MOVED = (
    "this generation has no coordinates: the binary log grew while the database was locked, as when a waiting"
    " statement is aborted; the next run tries again"
)
_AHEAD = (
    "this generation has no coordinates: the database is a replica with tables without transactions (MyISAM, Aria), and"
    " its copy may have rows that its position does not; --replica-pause stops its SQL thread for that moment"
)
_MAYBE_AHEAD = (
    "this generation has no coordinates: the database is a replica, and this login cannot see whether it has tables"
    " without transactions (MyISAM, Aria): GRANT SELECT ON *.*, or use --replica-pause to stop its SQL thread"
)
_STOPPED = (
    "the SQL thread of the replica is stopped (channel {}): if you did not stop it, a run that died did: execute"
    " START SLAVE"
)
#: Returns a context manager that stops the SQL threads of channels.
Pause = Callable[[mysqllock.Database, Sequence[str]], AbstractContextManager[None]]
#: Slashes in the path of a logical volume: ``/dev/GROUP/NAME``.
_SLASHES = 3


@dataclass(frozen=True)
class Moment:
    """How the moment of the image was taken. That took `took_s` seconds; the sources were taken within `apart_s`.

    `notes` and `warnings` belong in the manifest; the user must also see the `warnings`.
    """

    took_s: float
    quiesced: Quiesced | None = None
    database: Coordinates | None = None
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()
    apart_s: float | None = None


class Quiesce:
    """Writers are stopped only by the commands of --before and --after, which the agent runs, if there are any."""

    #: Directories on the host. The agent finds out on which source of the run each of them is.
    directories: Sequence[str] = ()
    #: The one of them that is the database's data directory.
    datadir: str | None = None

    def __init__(self, freezes: bool = False) -> None:
        self._freezes = freezes

    def check(self, ready: Ready, session: Session) -> None:
        """Raise `SourceError` if the volumes of the run are not those with the files of what is quiesced."""

    def holds(self, source: int) -> bool | None:
        """Return whether writers to a source of the run, numbered from 0, are stopped; None if unknown."""
        return self._freezes

    def around(self, session: Session) -> Moment:
        """Let the agent take the moment, and return how it was taken."""
        took_s = _take(session)
        return Moment(took_s, Quiesced("freeze", took_s) if self._freezes else None)


class CommandQuiesce(Quiesce):
    """The user's command in LVCREATE_PREFIX stops writers."""

    def __init__(self, command: str) -> None:
        super().__init__()
        self._command = command

    def around(self, session: Session) -> Moment:
        """See `Quiesce`; raises `ProcessError` if the command fails."""
        took_s, held_s = lockcommand.around(self._command, lambda: _take(session))
        return Moment(took_s, Quiesced("command", held_s))

    def holds(self, source: int) -> bool | None:
        """See `Quiesce`."""
        return True


class DatabaseQuiesce(Quiesce):
    """A database lock stops writers."""

    def __init__(
        self, database: mysqllock.Database, server: mysqllock.Server, freezes: bool, pause: Pause | None = None
    ) -> None:
        super().__init__(freezes)
        self._pause = pause
        self._database = database
        self._server = server
        self._notes = [note] if (note := database.note) else []
        self._held: set[int] | None = None
        self._unlogged: bool | None = None
        files = server.files
        self.datadir = files.needed[0]
        self.directories = [*files.needed, *(path for path, _what in files.others)]

    def check(self, ready: Ready, session: Session) -> None:
        """See `Quiesce`. If the database is not on the host itself, nothing can be checked, and a note says so."""
        places = [Outside(path, *place, "") for path, place in zip(self.directories, ready.places, strict=True)]
        data = places[0]
        where = printable(data.path)
        if self._server.hostname != session.host["hostname"] or not data.device:
            self._notes.append(
                "whether all files of the database are in this run was not checked: it does not run on the host itself"
                f" but on {printable(self._server.hostname, 200)}, with its data in {where}"
            )
            return
        self._unlogged = ready.unlogged
        if _is_unknown(data):
            self._notes.append(
                "whether all files of the database are in this run was not checked: the kernel does not say on which"
                f" device {where} is"
            )
        needed_paths, others = self._server.files.needed, dict(self._server.files.others)
        self._notes += [
            f"whether {printable(place.path)}, which the database needs, is in this run was not checked: the host has"
            " no such directory"
            for place in places
            if not place.device and place.path in needed_paths
        ]
        places = [place for place in places if place.device and not (_is_unknown(place) and _is_unknown(data))]
        self._notes += [
            f"{others[place.path]} in {printable(place.path)} are not in this run"
            for place in places
            if place.source is None and place.path in others
        ]
        needed = [place for place in places if place.path in needed_paths]
        needed += [place for place in ready.outside if not self._is_temporary(place.path)]
        if not _is_unknown(data):
            self._held = {place.source for place in needed if place.source is not None}
        _refuse_missing([place for place in needed if place.source is None], ready.devices)
        if len({place.device for place in needed}) > 1 and not self._freezes:
            raise SourceError(
                "the database keeps its files on several volumes, whose snapshots are not made at the same time",
                # not fsfreeze: device-mapper cannot suspend a device that is already frozen (Linux before 6.8)
                "stop it then: --before 'systemctl kill -s STOP mariadb' --after 'systemctl kill -s CONT mariadb'",
            )

    def holds(self, source: int) -> bool | None:
        """See `Quiesce`. The lock stops writes to the database only, so only sources with its files count."""
        return True if self._freezes else None if self._held is None else source in self._held

    def _paused(self, stack: ExitStack) -> list[str]:
        """Stop a replica's SQL threads until `stack` is closed; return a warning if some were stopped already."""
        assert self._pause is not None
        appliers = self._database.appliers()
        running = [each.channel for each in appliers if each.is_running]
        if running:
            stack.enter_context(self._pause(self._database, running))
        stopped = [printable(each.channel, 100) for each in appliers if each.is_receiving and not each.is_running]
        return [_STOPPED.format(", ".join(f"'{channel}'" for channel in stopped))] if stopped else []

    def _ahead(self) -> list[str]:
        """Return a warning if the copy may have rows that the replica's position does not include."""
        if not any(each.is_running for each in self._database.appliers()):
            return []
        unlogged = self._database.unlogged() if self._unlogged is None else self._unlogged
        return [] if unlogged is False else [_AHEAD if unlogged else _MAYBE_AHEAD]

    def _is_temporary(self, path: str) -> bool:
        return any(path == each or path.startswith(each + "/") for each in self._server.files.temporary)

    def around(self, session: Session) -> Moment:
        """See `Quiesce`; raises `DatabaseError` if the database could not be locked, or the lock was lost."""
        version = self._server.version
        with ExitStack() as stack:
            warnings = self._paused(stack) if self._pause is not None else []
            without = self._ahead()
            held = stack.enter_context(self._database.locked())
            before = held.position(version)
            session.begin_take()
            found = held.coordinates()
            took_s = session.end_take()
            held.prove()
            if not before == (found.binlog_file, found.binlog_position) == held.position(version):
                without.append(_MOVED)
            held.release()
        quiesced = Quiesced("mysql", held.held_s, list(held.statements), held.waited_s)
        return Moment(took_s, quiesced, None if without else found, self._notes, [*warnings, *without])


def _is_unknown(place: Outside) -> bool:
    """Return whether the kernel does not report the device, as for btrfs, ZFS, overlays and file systems in memory."""
    return place.device.startswith("0:")


def _refuse_missing(places: Sequence[Outside], devices: Mapping[str, str]) -> None:
    """Raise `SourceError` for places that the database needs and that are not in the run, with a hint to add them."""
    if not places:
        return
    shown = [f"{printable(place.path)} on {_volume(place, devices)}" for place in places[:_SHOWN]]
    more = f", and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    found = dict.fromkeys(_volume(place, devices) for place in places)
    volumes = [f"--also NAME={volume}" for volume in found if volume.count("/") == _SLASHES]
    hint = f"add the other volumes: {' '.join(volumes)}" if volumes else ""
    if len(volumes) < len(found):
        hint += "; " if hint else ""
        hint += "move what is not on a logical volume to one"
    raise SourceError(f"the database needs files that are not in this run: {', '.join(shown)}{more}", hint)


def _volume(place: Outside, devices: Mapping[str, str]) -> str:
    if place.device == ELSEWHERE:
        return "another device"
    return place.volume or devices.get(place.device) or f"device {place.device}"


def _take(session: Session) -> float:
    session.begin_take()
    return session.end_take()


@contextmanager
def database(
    session: Session, account: Account, limits: mysqllock.Limits, freezes: bool, way: replicapause.Way | None = None
) -> Iterator[Quiesce]:
    """Yield what locks a database; its session ends with the `with` statement. Raises `DatabaseError`.

    With `way`, which is how to connect to the host again, a replica's SQL threads are stopped during the lock.
    """
    with ExitStack() as stack:
        sock = None
        if account.through_ssh:
            sockets = SOCKETS if account.socket is None else [account.socket]
            account = replace(account, user=account.user or session.host["user"])
            sock = stack.enter_context(session.tunnel(sockets, port=0))
        found = stack.enter_context(mysqllock.connect(account, limits, sock=sock))
        pause = None if way is None else partial(replicapause.paused, account, way)
        yield DatabaseQuiesce(found, found.check(with_pause=way is not None), freezes, pause)
