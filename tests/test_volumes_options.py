"""The options about volumes and databases: what they mean together, and what is refused because it means nothing."""

from pathlib import Path
from typing import cast

import pytest

from blockdiff.backup import VolumeOptions
from blockdiff.cli import backup
from blockdiff.cli.backupoptions import CommandLine, options
from blockdiff.database.accounts import Account
from blockdiff.mysqllock import Limits
from blockdiff.shared.errors import UsageError
from tests import commands

#: What click passes where nothing is given.
NOTHING: CommandLine = {
    "block_size": None,
    "digest": None,
    "delta_format": None,
    "compression": "gzip",
    "level": None,
    "full": False,
    "period": None,
    "via": None,
    "ssh_options": (),
    "bwlimit": None,
    "streams": 1,
    "lvm": False,
    "snapshot_size": None,
    "mysql": None,
    "lock_wait": None,
    "long_query": None,
    "max_hold": None,
    "replica_pause": False,
    "before": None,
    "after": None,
    "also": (),
    "keep_snapshot": False,
    "audit": False,
    "mounted": False,
    "dry_run": False,
    "verbose": False,
    "as_json": False,
}
MYSQL = ("--mysql", "mysql://u@127.0.0.1/")


def parsed(**given: object) -> VolumeOptions | None:
    return options(cast(CommandLine, {**NOTHING, **given}), suffix="", prefix=None).volumes


def test_click_passes_nothing_else() -> None:
    context = backup.command.make_context("backup", ["name", "/source"])
    assert {name: context.params[name] for name in NOTHING} == NOTHING
    assert set(context.params) - set(NOTHING) == {"name", "source"}


def test_without_lvm_there_are_none() -> None:
    assert parsed() is None


def test_defaults() -> None:
    found = parsed(lvm=True)
    assert found == VolumeOptions("20%", None, Limits(30, 60, 60), False, False)


def test_each_option_arrives() -> None:
    found = parsed(
        lvm=True,
        snapshot_size="5G",
        mysql="mysql://u:@db00:33/",
        lock_wait=1.5,
        long_query=2.0,
        max_hold=3.0,
        keep_snapshot=True,
        audit=True,
        replica_pause=True,
    )
    account = Account("u", "", "db00", 33)
    assert found == VolumeOptions("5G", account, Limits(1.5, 2.0, 3.0), True, True, True)


def test_the_word_ssh_leaves_the_user_to_the_host() -> None:
    found = parsed(lvm=True, mysql="ssh")
    assert found is not None and found.database == Account("", "", through_ssh=True)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"snapshot_size": "20%"}, "--snapshot-size needs --lvm"),
        ({"mysql": "ssh"}, "--mysql needs --lvm"),
        ({"lock_wait": 5.0}, "--lock-wait needs --lvm"),
        ({"keep_snapshot": True}, "--keep-snapshot needs --lvm"),
        ({"audit": True}, "--audit needs --lvm"),
        ({"lvm": True, "audit": True}, "--audit needs --keep-snapshot"),
        ({"lvm": True, "replica_pause": True}, "--replica-pause needs --mysql"),
        ({"lvm": True, "lock_wait": 5.0}, "--lock-wait needs --mysql"),
        ({"lvm": True, "long_query": 0.0}, "--long-query needs --mysql"),
        ({"lvm": True, "max_hold": 5.0}, "--max-hold needs --mysql"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parsed(**given)
    assert caught.value.message == words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--mysql", "ssh"), "--mysql needs --lvm"),
        (("--streams", "2", "--before", ""), "--streams cannot be combined with --before and --after"),
        (("--streams", "2", "--after", ""), "--streams cannot be combined with --before and --after"),
        (("--lvm", "--audit"), "--audit needs --keep-snapshot"),
        (("--also", "other=/dev/vg/other"), "--also needs --lvm: only snapshots give several sources one moment"),
        (("--lvm", "--also", "/dev/vg/other"), "--also /dev/vg/other is not NAME=/PATH"),
        (("--lvm", "--also", "=/dev/vg/other"), "--also =/dev/vg/other is not NAME=/PATH"),
        (("--lvm", "--also", "other="), "--also other= is not NAME=/PATH"),
        (("--lvm", "--also", "other=vg/other"), "--also other=vg/other is not NAME=/PATH"),
        (("--lvm", "--also", "other=host:/dev/vg/other"), "--also other=host:/dev/vg/other is not NAME=/PATH"),
        (("--lvm", "--also", "{name}=/dev/vg/x"), "two sources of one run cannot go to the same chain"),
        (("--lvm", "--also", "{name}/../disk=/dev/vg/x"), "two sources of one run cannot go to the same chain"),
        (("--lvm", "--mysql", "postgres://u@h/"), "the database must be mysql://USER@HOST/"),
        (("--lvm", "--mysql", ""), "the database must be mysql://USER@HOST/"),
        (("--lvm", "--mysql", "mysql://u:hush@h:x/"), "the URL of the database is not valid"),
        (("--lvm", *MYSQL, "--lock-wait", "0"), "0.0 is not in the range 1<=x<=86400"),
        (("--lvm", *MYSQL, "--long-query", "-1"), "-1.0 is not in the range 1<=x<=86400"),
        (("--lvm", *MYSQL, "--max-hold", "1e9"), "1000000000.0 is not in the range 1<=x<=86400"),
        (("--lvm", *MYSQL, "--max-hold", "a while"), "'a while' is not a valid float"),
        (("--lvm", "--keep-snapshot=yes"), "--keep-snapshot"),
    ],
)
def test_the_command_refuses_it_before_it_does_anything(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    name = tmp_path / "backup" / "disk"
    name.parent.mkdir()
    more = [argument.format(name=name) for argument in arguments]
    result = commands.run("blockdiff", "backup", name, "/dev/vg/disk", *more)
    assert (result.returncode, result.stdout) == (2, b"")
    assert words in " ".join(result.stderr.decode().split())
    assert b"hush" not in result.stderr and b"Traceback" not in result.stderr
    assert list(name.parent.iterdir()) == []
