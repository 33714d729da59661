"""``blockdiff status``: for monitoring."""

import errno
import json
import os
import re
import secrets
import stat
import sys
import time
from contextlib import suppress

import click

from blockdiff.chain import clock, monitoring
from blockdiff.cli import completion
from blockdiff.cli.output import say_error
from blockdiff.shared.errors import StorageError, printable

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"([0-9]{1,9})(s|m|min|h|d|w)")


class Age(click.ParamType[float]):
    """A length of time: a number with s, m, h, d or w after it. In seconds."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number of seconds."""
        match = _AGE.fullmatch(str(value))
        if match is None:
            self.fail(f"{printable(str(value), 100)!r} is not an age; use one like 26h or 8d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


class _UsageError(click.UsageError):
    """A usage error with the exit status of a plug-in."""

    exit_code = monitoring.State.UNKNOWN


class _Plugin(click.Command):
    """A command for which 2 means critical: its usage errors have the status 3, unknown."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; raises `click.UsageError`."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            raise _UsageError(error.format_message(), ctx) from error


@click.command("status", cls=_Plugin)
@click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completion.chains)
@click.option("--max-age", type=Age(), default="26h", show_default=True, help="Of the last generation: 90m, 26h, 8d.")
@click.option("--tap", is_flag=True, help="Print the Test Anything Protocol: a test for each chain.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for each chain.")
@click.option(
    "--prometheus",
    "metrics",
    metavar="FILE",
    shell_complete=completion.files,
    help="Write metrics for the node exporter to FILE as well.",
)
def command(names: tuple[str, ...], max_age: float, tap: bool, as_json: bool, metrics: str | None) -> None:
    """Report the state of chains, for monitoring.

    One line, with the exit statuses of Nagios plug-ins: 0 ok, 1 warning, 2 critical (too old, missing or damaged),
    3 unknown, usage errors included. Of NAME and the NAME-DATE of `backup --chain`, the newest counts. Looks at names,
    sizes and manifests; `verify` reads the data.

    \b
    Example:
      blockdiff status /var/backup/web1 /var/backup/vm7 --max-age 26h
    """
    found = monitoring.look_at_all(dict.fromkeys(names), max_age, time.time())
    if metrics is not None:
        try:
            _write(metrics, monitoring.prometheus(found))
        except StorageError as error:
            say_error(error)
            found.append(monitoring.Status(metrics, monitoring.State.UNKNOWN, error.message))
    if as_json:
        click.echo(json.dumps([_summary(each) for each in found], indent=1))
    else:
        click.echo(monitoring.tap(found) if tap else monitoring.nagios(found, max_age))
    sys.exit(monitoring.worst(found))


def _summary(found: monitoring.Status) -> dict[str, object]:
    """Return the state of a chain, in the words of `list --json`."""
    return {
        "name": found.name,
        "chain": found.chain,
        "state": found.state.name.lower(),
        "text": found.text,
        "generation": found.generation,
        "when": None if found.finished is None else clock.iso(found.finished),
        "age_s": None if found.age_s is None else int(found.age_s),
        "image_size": found.image_bytes,
        "stored": found.stored_bytes,
    }


def _write(path: str, text: str) -> None:
    """Write a file that another user reads at any time: complete, or as it was before. Raises `StorageError`.

    The owner of the directory cannot choose what is written to: the name is random, new, and never followed.
    """
    temporary = os.path.join(os.path.dirname(path), f".{secrets.token_hex(8)}.tmp")
    try:
        _refuse_special(path)
        try:
            fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(fd, 0o644)  # whatever the umask is, the exporter reads it
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise StorageError(
            f"cannot write the metrics to {printable(path)}: {error.strerror}",
            "create the directory first" if error.errno == errno.ENOENT else None,
        ) from error


def _refuse_special(path: str) -> None:
    """Raise `StorageError` if something that is not a file has the name: /dev/stdout must not be replaced."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise StorageError(f"cannot write the metrics to {printable(path)}: it is {what}", "name the file itself")
