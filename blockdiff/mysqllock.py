"""Lock a MySQL or MariaDB server for writers for a short time, and prove that the lock was held.

The lock belongs to a session and ends with it, whatever ends the session: we, a broken connection, or the server, which
is set to end it if it receives nothing from us for a while. We never end the sessions of others.
"""

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType

from blockdiff.database import coordinates, datafiles, redolog
from blockdiff.database.accounts import Account
from blockdiff.database.bounds import TimedOut
from blockdiff.database.coordinates import Applier, Coordinates, Row, Version
from blockdiff.database.datafiles import Files
from blockdiff.database.sqlsession import Lacking, SqlSession
from blockdiff.shared import process, trace
from blockdiff.shared.errors import DatabaseError, ProcessError, printable

#: The exit status for a command that died of a signal, as in the original.
SIGNALLED = 255

#: How much longer than --lock-wait we wait for the server to report that the wait timed out, in seconds.
_GRACE_S = 5.0
_POLL_INTERVAL_S = 0.25
_HOLD_HINT = "raise --max-hold if writers may wait that long"
_BACKUP_STAGE = (("BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"), ("BACKUP STAGE END",))
_READ_LOCK = (("FLUSH TABLES WITH READ LOCK",), ("UNLOCK TABLES",))
_SYSTEM_USERS = ("system user", "event_scheduler", "unauthenticated user")


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds, each at least 1.

    `lock_wait_s`: how long to wait for the lock, including the wait for long statements. `long_query_s`: wait for
    statements older than this before asking for the lock. `max_hold_s`: how long the lock may be held; if we die, the
    server ends it after this time.
    """

    lock_wait_s: float = 30.0
    long_query_s: float = 60.0
    max_hold_s: float = 60.0


@dataclass(frozen=True)
class Statements:
    """The statements that lock and unlock. None: chosen by product and version of the server.

    If only one of the two is given, the other is the one for ``FLUSH TABLES WITH READ LOCK``, as in the original.
    """

    before: Sequence[str] | None = None
    after: Sequence[str] | None = None

    def chosen(self, version: Version) -> tuple[Sequence[str], Sequence[str]]:
        """Return the statements for a server of this version."""
        if self.before is None and self.after is None:
            return _BACKUP_STAGE if version.is_mariadb(10, 4, 1) else _READ_LOCK
        before, after = _READ_LOCK
        return self.before if self.before is not None else before, self.after if self.after is not None else after


@dataclass(frozen=True)
class Server:
    """What a check found: the name of the database server's machine, as it reports it, and where its files are."""

    version: Version
    hostname: str
    files: Files


def _nothing(_line: str) -> None:
    pass


class Held:
    """A lock, from the first lock statement on. Times are in seconds."""

    def __init__(
        self, session: SqlSession, before: Sequence[str], after: Sequence[str], say: Callable[[str], None]
    ) -> None:
        self.statements = tuple(before)
        #: From the start of the wait for long statements until the database was locked.
        self.waited_s = 0.0
        self._session = session
        self._after = tuple(after)
        self._say = say
        self._id = 0
        self._max_hold_s = 0.0
        self._begun = False
        self._since = 0.0
        self._until: float | None = None

    @property
    def held_s(self) -> float:
        """From the end of the last lock statement to the start of the first unlock statement, or until now."""
        return (time.monotonic() if self._until is None else self._until) - self._since

    def coordinates(self) -> Coordinates:
        """Return the server's position under the lock. Raises `DatabaseError`."""
        return coordinates.read(self._session.rows)

    def position(self, version: Version) -> tuple[str | None, int | None]:
        """Return file and position of the server's binary log, with a single query. Raises `DatabaseError`."""
        return coordinates.position(self._session.rows, version)

    def prove(self, before: str = "the snapshot was made") -> None:
        """Raise `DatabaseError` unless the session, and so the lock, has existed from the lock statement until now.

        `before` completes the message "the lock was lost before ...".
        """
        lost = f"the lock was lost before {before}"
        try:
            same = self._session.number("SELECT CONNECTION_ID()") == self._id
        except DatabaseError as error:
            if self.held_s >= self._max_hold_s:
                raise DatabaseError(
                    f"{lost}: the database ended it after the {self._max_hold_s:g} s of --max-hold", _HOLD_HINT
                ) from error
            raise DatabaseError(f"{lost}: {error.message}", "what was made is not consistent; run it again") from error
        if not same:
            raise DatabaseError(f"{lost}: {self._session.place} answers from another session", "is a proxy in between?")
        if self.held_s > self._max_hold_s:
            raise DatabaseError(
                f"the lock was held for {self.held_s:.1f} s, longer than the {self._max_hold_s:g} s of --max-hold",
                _HOLD_HINT,
            )

    def release(self) -> None:
        """Execute the unlock statements, once. Raises `DatabaseError`; the lock then ends with the session."""
        if self._until is not None:
            return
        self._until = time.monotonic()
        trace.phase("unlock the database")
        try:
            for statement in self._after:
                self._say(f"issuing unlock statement: {statement}")
                self._session.execute(statement)
        except BaseException:
            self._session.close()
            raise

    def acquire(self, limits: Limits, started: float, bound: Callable[[float], None]) -> None:
        """Execute the lock statements. `bound` limits the next statement to the time left until a deadline.

        Only `Database` calls this.
        """
        self._max_hold_s = limits.max_hold_s
        self._session.limit(limits.max_hold_s)
        self._id = self._session.number("SELECT CONNECTION_ID()")
        try:
            for statement in self.statements:
                bound(started + limits.lock_wait_s)
                self._say(f"issuing lock statement: {statement}")
                self._session.execute(statement)
                self._begun = True
        except TimedOut as error:
            raise DatabaseError(
                f"{self._session.place}: could not get the lock within {time.monotonic() - started:.1f} s",
                f"another session is in its way; a larger --lock-wait (now {limits.lock_wait_s:g} s) waits longer",
            ) from error
        self._since = time.monotonic()
        self.waited_s = self._since - started

    def abandon(self) -> None:
        """Release what was locked so far, and end the session: if something is still locked, that ends it."""
        try:
            if self._begun:
                self.release()
        except DatabaseError:
            pass  # the error that led here is the one to report
        finally:
            self._session.close()


class Database:
    """A database that can be locked for writers. Ends its session at the end of the `with` statement."""

    def __init__(self, session: SqlSession, limits: Limits, statements: Statements, say: Callable[[str], None]) -> None:
        self._session = session
        self._limits = limits
        self._statements = statements
        self._say = say
        self.version = Version.parse(str(session.rows("SELECT VERSION() AS version")[0]["version"]))

    @property
    def note(self) -> str:
        """A note for the user about an insecure connection to the database; ``""`` if it is secure."""
        if not self._session.is_open:
            return ""
        return (
            f"the login to {self._session.place} went over the network without encryption: the password was not"
            " sent, but somebody who records it can try to guess it; ?ssl-ca=FILE or mysql+ssh:// encrypt"
        )

    def __enter__(self) -> "Database":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.close()

    def check(self, with_coordinates: bool = True, with_pause: bool = False) -> Server:
        """Check what can be checked without a lock, above all whether the account has the privileges that are needed.

        With `with_coordinates`, these include the privileges to read the position of the database; with `with_pause`,
        those to stop and start the SQL thread of a replica.

        Raises `DatabaseError`, which names all privileges that are missing and the statement that grants them.
        """
        rows, missing = self._session.rows, []
        for question in self._questions(with_coordinates, with_pause):
            try:
                question()
            except Lacking as error:
                missing += [name for name in error.privileges if name not in missing]
        if missing:
            raise self._session.lacking(missing)
        redolog.check(rows, self._limits.max_hold_s)
        (row,) = rows("SELECT @@GLOBAL.hostname AS hostname")
        return Server(self.version, str(row["hostname"]), datafiles.read(rows))

    def _questions(self, with_coordinates: bool, with_pause: bool) -> Iterator[Callable[[], object]]:
        """Yield functions that fail if the account lacks a privilege that is needed later, and do nothing else."""
        rows = self._session.rows
        if rows("SELECT 1 FROM information_schema.ENGINES WHERE ENGINE = 'InnoDB' AND SUPPORT IN ('YES', 'DEFAULT')"):
            # needs PROCESS; without this privilege, SHOW PROCESSLIST lists only our own sessions, without an error
            yield lambda: rows("SELECT 1 FROM information_schema.INNODB_METRICS LIMIT 1")
        if self._statements.before is None:
            yield lambda: rows("FLUSH LOCAL TABLES mysql.blockdiff_no_such_table")  # needs RELOAD, and does nothing
        if with_coordinates:
            yield lambda: coordinates.position(rows, self.version)
            yield self.appliers
            yield lambda: coordinates.read(rows)
        if with_pause:
            yield self._start_running

    def appliers(self) -> list[Applier]:
        """Return the SQL threads that apply the changes of other servers. Raises `DatabaseError`."""
        return coordinates.appliers(self._session.rows, self.version)

    def _start_running(self) -> None:
        """Start the SQL threads that are running: that changes nothing, but needs the privilege to start and stop."""
        self.start_appliers([each.channel for each in self.appliers() if each.is_running])

    def stop_appliers(self, channels: Sequence[str]) -> None:
        """Stop the SQL threads of these channels, and check that they are stopped. Raises `DatabaseError`."""
        for channel in channels:
            self._session.execute(coordinates.applier_statement("STOP", self.version, channel))
        running = [each.channel for each in self.appliers() if each.is_running and each.channel in channels]
        if running:
            raise DatabaseError(f"{self._session.place}: the SQL thread of the replica does not stop")

    def start_appliers(self, channels: Sequence[str]) -> None:
        """Start the SQL threads of these channels; a running one continues. Raises `DatabaseError`."""
        for channel in channels:
            self._session.execute(coordinates.applier_statement("START", self.version, channel))

    def stay(self, seconds: float) -> None:
        """Let the server keep the session while it is idle for this many seconds. Raises `DatabaseError`."""
        self._session.limit(seconds)

    def unlogged(self) -> bool | None:
        """See `datafiles.unlogged`."""
        return datafiles.unlogged(self._session.rows)

    @contextmanager
    def locked(self) -> Iterator[Held]:
        """Lock the database for writers within the `with` statement; yields the lock, which may be released earlier.

        Waits first until no long statement runs, then for the lock, at most `Limits.lock_wait_s` in total. Raises
        `DatabaseError` if that time was not enough. Then writers continue at once, as they do if an exception ends the
        `with` statement.
        """
        started = time.monotonic()
        trace.phase("wait for long statements")
        self._wait_for_long_statements(started + self._limits.lock_wait_s)
        before, after = self._statements.chosen(self.version)
        held = Held(self._session, before, after, self._say)
        log_is_late = redolog.is_late(self._session.rows)
        trace.phase("lock the database")
        try:
            held.acquire(self._limits, started, self._bound)
            trace.phase("the database is locked")
            self._unbound()
            if log_is_late:
                redolog.wait(self._session.rows)
            yield held
        except BaseException:
            held.abandon()
            raise
        held.release()

    def _bound(self, deadline: float) -> None:
        """Let each statement time out at `deadline`. Raises `TimedOut` if the deadline has passed."""
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimedOut(f"{self._session.place}: there was no time left for the lock")
        # the server applies this to each of the several locks of one statement ...
        settings = f"lock_wait_timeout={math.ceil(left_s)}"
        if self._limits_statements:  # ... and this to all of them together
            settings += f", max_statement_time={left_s:.3f}"
        self._session.execute(f"SET SESSION {settings}")

    def _unbound(self) -> None:
        """Remove the time limit for statements under the lock."""
        if self._limits_statements:
            self._session.execute("SET SESSION max_statement_time=0")

    @property
    def _limits_statements(self) -> bool:
        return self.version.is_mariadb(10, 1, 1)

    def _wait_for_long_statements(self, deadline: float) -> None:
        own = self._session.number("SELECT CONNECTION_ID()")
        while (row := self._longest_statement(own)) is not None:
            if time.monotonic() >= deadline:
                raise DatabaseError(
                    f"{self._session.place}: a statement ({_first_word(row)}) of the user "
                    f"{printable(str(row['User']), 100)} in session {row['Id']} has been running for {_age_s(row)} s",
                    "a lock queued after it stalls every writer; a larger --long-query "
                    f"(now {self._limits.long_query_s:g} s) ignores it, a larger --lock-wait "
                    f"(now {self._limits.lock_wait_s:g} s) waits longer",
                )
            time.sleep(_POLL_INTERVAL_S)

    def _longest_statement(self, own: int) -> Row | None:
        """Return the oldest statement, if it is older than allowed, as a row of the list of sessions."""
        rows = [row for row in self._session.rows("SHOW PROCESSLIST") if row["Id"] != own and _is_statement(row)]
        oldest = max(rows, key=_age_s, default=None)
        return oldest if oldest is not None and _age_s(oldest) > self._limits.long_query_s else None


def connect(
    account: Account,
    limits: Limits = Limits(),
    statements: Statements = Statements(),
    sock: socket.socket | None = None,
    say: Callable[[str], None] = _nothing,
) -> Database:
    """Log in, over `sock` if it is given: a connection to the database server, which will be closed with the session.

    `say` is called with a line before each lock and unlock statement. Raises `DatabaseError`.
    """
    session = SqlSession(account, limits.lock_wait_s + _GRACE_S, sock)
    try:
        return Database(session, limits, statements, say)
    except BaseException:
        session.close()
        raise


def run_locked(database: Database, command: Sequence[str]) -> int:
    """Run a command under the lock, and return its exit status, or `SIGNALLED`.

    The command inherits standard input, output and error. To be called in the main thread: a signal then ends the
    command and the lock. Raises `ProcessError` if the command cannot be started, and `DatabaseError` if the database
    could not be locked, or if the lock was lost while the command ran, whatever its exit status.
    """
    if shutil.which(command[0]) is None:
        raise ProcessError(f"cannot run {printable(command[0])}: no such command", "is it on the PATH?")
    with database.locked() as held:
        status = _run(command)
        held.prove("the command had ended")
    return status


def _run(command: Sequence[str]) -> int:
    try:
        with process.started(lambda: subprocess.Popen(list(command))) as child:
            status = child.wait()
    except OSError as error:
        raise ProcessError(f"cannot run {printable(command[0])}: {error.strerror}") from error
    return status if status >= 0 else SIGNALLED


def _is_statement(row: Row) -> bool:
    """Return whether a session executes a statement of a user."""
    return bool(row["Info"]) and row["User"] not in _SYSTEM_USERS


def _age_s(row: Row) -> int:
    return int(str(row["Time"] or 0))


def _first_word(row: Row) -> str:
    """Return only the first word of a statement: the rest may contain secrets."""
    word = (str(row["Info"]).split(None, 1) or [""])[0]
    return word.upper() if word.isascii() and word.isalpha() and len(word) <= 20 else str(row["Command"])
