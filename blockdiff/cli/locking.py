"""The command `mysqllock` of the 2010 original, with its options, and some more."""

import sys

import click

from blockdiff import __version__, mysqllock
from blockdiff.cli.arguments import SECONDS
from blockdiff.cli.outcome import run
from blockdiff.database import accounts
from blockdiff.database.accounts import LoginOptions
from blockdiff.mysqllock import Limits, Statements


@click.command(context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False})
@click.option("--user", help="Default: from the option file, USER in the environment, or root.")
@click.option("--password", help="Others can see it in `ps`: prefer an option file, MYSQL_PWD or the socket.")
@click.option("--host", help="Default: localhost, through its socket if it has one.")
@click.option("--port", type=click.IntRange(1, 65535), help="Default: 3306.")
@click.option("--socket", metavar="PATH", help="The server's socket on this machine.")
@click.option("--db", metavar="NAME", help="The database for the statements; the lock does not need one.")
@click.option("--defaults-file", metavar="PATH", help="Options of the groups [client] and [mysqllock], in mode 0600.")
@click.option(
    "--before", metavar="STMT", multiple=True, help="The statement that locks. Default: the best that the server has."
)
@click.option("--after", metavar="STMT", multiple=True, help="The statement that unlocks.")
@click.option(
    "--lock-wait",
    type=SECONDS,
    default=30.0,
    show_default=True,
    help="Give up without the lock after this many seconds.",
)
@click.option(
    "--long-query", type=SECONDS, default=60.0, show_default=True, help="Wait for statements older than this."
)
@click.option(
    "--max-hold", type=SECONDS, default=60.0, show_default=True, help="Seconds; then the server releases the lock."
)
@click.version_option(__version__, message="%(version)s")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def _mysqllock(
    user: str | None,
    password: str | None,
    host: str | None,
    port: int | None,
    socket: str | None,
    db: str | None,
    defaults_file: str | None,
    before: tuple[str, ...],
    after: tuple[str, ...],
    lock_wait: float,
    long_query: float,
    max_hold: float,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND while a MySQL or MariaDB server is locked for writers.

    Exits with the status of COMMAND (255: it died of a signal), and with 1 if the lock was not obtained, or was
    lost before COMMAND ended.
    """
    account = accounts.from_options(LoginOptions(user, password, host, port, socket, db, defaults_file))
    limits = Limits(lock_wait, long_query, max_hold)
    statements = Statements(before or None, after or None)
    with mysqllock.connect(account, limits, statements, say=_say) as database:
        if database.note:
            _say(f"note: {database.note}")
        database.check(with_coordinates=False)
        status = mysqllock.run_locked(database, command)
    sys.exit(status)


def _say(line: str) -> None:
    click.echo(line, err=True)


def main() -> None:
    """The entry point."""
    run(_mysqllock, "mysqllock")
