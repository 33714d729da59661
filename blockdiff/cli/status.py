"""``blockdiff status``: for monitoring."""

import json
import os
import re
import sys
import time

import click

from blockdiff import clock, status
from blockdiff.cli import say_error
from blockdiff.errors import StorageError, printable

_UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_AGE = re.compile(r"([0-9]{1,9})(s|m|min|h|d|w)")


class Age(click.ParamType[float]):
    """A length of time: a number with s, m, h, d or w behind it. In seconds."""

    name = "age"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the number of seconds."""
        match = _AGE.fullmatch(str(value))
        if match is None:
            self.fail(f"{printable(str(value), 100)!r} is no age; use one like 26h or 8d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


@click.command("status")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--max-age", type=Age(), default="26h", show_default=True, help="Of the last generation: 90m, 26h, 8d.")
@click.option("--tap", is_flag=True, help="Print the Test Anything Protocol: a test for each chain.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: an object for each chain.")
@click.option("--prometheus", "metrics", metavar="FILE", help="Write metrics for the node exporter to FILE as well.")
def command(names: tuple[str, ...], max_age: float, tap: bool, as_json: bool, metrics: str | None) -> None:
    """Say how chains are doing, for monitoring.

    One line, with the exit statuses of Nagios plug-ins: 0 ok, 1 warning, 2 critical (too old, missing or damaged),
    3 unknown. NAME-DATE of `backup --chain` is found as NAME. Looks at names, sizes and manifests; `verify` reads the
    data.
    """
    found = [status.look(name, max_age, time.time()) for name in names]
    if metrics is not None:
        try:
            _write(metrics, status.prometheus(found))
        except StorageError as error:
            say_error(error)
            sys.exit(status.State.UNKNOWN)
    if as_json:
        click.echo(json.dumps([_summary(each) for each in found], indent=1))
    else:
        click.echo(status.tap(found) if tap else status.nagios(found, max_age))
    sys.exit(status.worst(found))


def _summary(found: status.Status) -> dict[str, object]:
    """Return how a chain is doing, in the words of `list --json`."""
    return {
        "name": found.name,
        "state": found.state.name.lower(),
        "text": found.text,
        "generation": found.generation,
        "when": None if found.finished is None else clock.iso(found.finished),
        "age_s": found.age_s,
        "image_size": found.image_bytes,
        "stored": found.stored_bytes,
    }


def _write(path: str, text: str) -> None:
    """Write a file that is read by another user at any time: complete, or as it was before."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        try:
            os.unlink(temporary)
        except FileNotFoundError:
            pass
        raise StorageError(f"cannot write {printable(path)}: {error.strerror}") from error
