"""Where a database lies, and whether that is on the volumes of the run; and how a moment is told."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from blockdiff.database.accounts import Account
from blockdiff.database.coordinates import Version
from blockdiff.database.datafiles import Files
from blockdiff.format.manifest import Quiesced
from blockdiff.host import sources
from blockdiff.mysqllock import Server, connect
from blockdiff.original import lockcommand
from blockdiff.quiesce import CommandQuiesce, DatabaseQuiesce, Moment, Quiesce
from blockdiff.session.rules import Outside, Ready
from blockdiff.session.session import Session
from blockdiff.shared import devices
from blockdiff.shared.errors import ProcessError, SourceError
from blockdiff.transport.address import Address
from tests import loop, mounts
from tests.mariadb import MariaDB

HERE = "db00"
#: The number of a device that is there on every machine.
NULL = os.stat("/dev/null").st_rdev


class Host(Session):
    """Stands in for a session: the machine it is with, and a moment that is taken at once."""

    def __init__(self, hostname: str = HERE) -> None:
        super().__init__(Address(hostname, "/"))
        self.host = {"hostname": hostname, "python": "3.11", "user": "root"}
        self.taken = 0

    def begin_take(self) -> None:
        self.taken += 1

    def end_take(self) -> float:
        return 1.5


@pytest.fixture
def database(mariadb: MariaDB) -> Iterator[Callable[..., DatabaseQuiesce]]:
    """Makes what checks the places of these directories, for a database on the machine called `hostname`."""
    with connect(Account(mariadb.user, "", socket=str(mariadb.socket))) as found:

        def make(
            *directories: str,
            freezes: bool = False,
            hostname: str = HERE,
            others: tuple[tuple[str, str], ...] = (),
            temporary: tuple[str, ...] = (),
        ) -> DatabaseQuiesce:
            files = Files(directories, others, temporary)
            return DatabaseQuiesce(found, Server(Version.parse("11.4.2-MariaDB"), hostname, files), freezes)

        yield make


def ready(*places: tuple[str, int | None]) -> Ready:
    return Ready([], list(places), ())


Make = Callable[..., DatabaseQuiesce]


def test_a_database_on_a_volume_of_the_run_is_fine(database: Make) -> None:
    database("/data").check(ready(("254:3", 0)), Host())
    database("/data", "/data/log").check(ready(("254:3", 1), ("254:3", 1)), Host())


@pytest.mark.parametrize("freezes", [False, True])
def test_a_directory_on_another_device_is_refused(database: Make, freezes: bool) -> None:
    with pytest.raises(SourceError) as caught:
        database("/data", "/re\ndo", freezes=freezes).check(ready(("254:3", 0), ("8:1", None)), Host())
    assert caught.value.message == (r"the database needs files that are not in this run: /re\ndo on device 8:1")
    assert caught.value.hint == "move what is not on a logical volume to one"


def test_all_that_is_missing_is_named_with_what_would_take_it(database: Make) -> None:
    """What the server told, and what was found on the host."""
    found = Ready(
        [],
        [("254:3", 0), ("254:4", None)],
        (),
        {"254:4": "/dev/vg/redo"},
        (
            Outside("/data/shop/t.MYD", "254:5", None, "/dev/vg/far"),
            Outside("/data/shop/t.MYI", "254:5", None, "/dev/vg/far"),
            Outside("/data/sorted", "8:1", None, "/dev/sda1"),
            *(Outside(f"/data/{n}", "254:5", None, "/dev/vg/far") for n in range(18)),
        ),
    )
    with pytest.raises(SourceError) as caught:
        database("/data", "/redo").check(found, Host())
    assert caught.value.message == (
        "the database needs files that are not in this run: /redo on /dev/vg/redo, /data/shop/t.MYD on /dev/vg/far,"
        " /data/shop/t.MYI on /dev/vg/far, /data/sorted on /dev/sda1, "
        + ", ".join(f"/data/{n} on /dev/vg/far" for n in range(16))
        + ", and 2 more"
    )
    assert caught.value.hint == (
        "add the other volumes: --also NAME=/dev/vg/redo --also NAME=/dev/vg/far;"
        " move what is not on a logical volume to one"
    )


def test_what_lies_on_another_volume_of_the_run_needs_a_freeze(database: Make) -> None:
    found = Ready([], [("254:3", 0)], (), {}, (Outside("/data/shop/t.MYD", "254:5", 1, ""),))
    with pytest.raises(SourceError, match="on several volumes, whose snapshots are not made at the same time"):
        database("/data").check(found, Host())
    database("/data", freezes=True).check(found, Host())


def test_temporary_files_are_not_missed(database: Make) -> None:
    found = Ready([], [("254:3", 0)], (), {}, (Outside("/data/tmp", "0:45", None, ""),))
    database("/data", temporary=("/data/tmp",)).check(found, Host())
    with pytest.raises(SourceError, match="/data/tmp on device 0:45"):
        database("/data").check(found, Host())


def test_what_is_not_needed_and_not_there_is_a_note(database: Make) -> None:
    host, logs = Host(), (("/bin/logs", "the binary logs"), ("/data/relay", "the relay logs"))
    quiesced = database("/data", others=logs)
    assert quiesced.directories == ["/data", "/bin/logs", "/data/relay"]
    quiesced.check(ready(("254:3", 0), ("8:1", None), ("254:3", 0)), host)
    assert quiesced.around(host).notes == ["the binary logs in /bin/logs are not in this run"]


def test_a_lock_holds_what_the_database_lies_on(database: Make) -> None:
    found = database("/data")
    found.check(ready(("254:3", 1)), Host())
    assert [found.holds(source) for source in range(3)] == [False, True, False]
    frozen = database("/data", freezes=True)
    frozen.check(ready(("254:3", 1)), Host())
    assert [frozen.holds(source) for source in range(2)] == [True, True]
    elsewhere = database("/data", hostname="guest")
    elsewhere.check(ready(("", None)), Host())
    assert elsewhere.holds(0) is None
    assert [Quiesce(freezes).holds(0) for freezes in (False, True)] == [False, True]
    assert CommandQuiesce("lock it").holds(0) is True


def test_several_volumes_need_a_freeze(database: Make) -> None:
    """Their snapshots are not made at the same instant, and the lock does not stop all that the database writes."""
    places = ready(("254:3", 0), ("254:4", 1))
    with pytest.raises(SourceError) as caught:
        database("/data", "/redo").check(places, Host())
    assert caught.value.message == (
        "the database keeps its files on several volumes, whose snapshots are not made at the same time"
    )
    assert "--before 'systemctl kill -s STOP" in str(caught.value.hint)
    assert "--after 'systemctl kill -s CONT" in str(caught.value.hint)
    database("/data", "/redo", freezes=True).check(places, Host())


def test_what_the_kernel_does_not_tell_is_no_reason_to_refuse_but_a_note(database: Make) -> None:
    """Of btrfs, ZFS or overlays the number tells no device."""
    host, quiesced = Host(), database("/data", "/redo")
    quiesced.check(ready(("0:45", None), ("254:3", 0)), host)
    (note,) = quiesced.around(host).notes
    assert note.endswith("was not checked: the kernel does not say on which device /data is")


def test_a_directory_that_the_host_does_not_have_is_a_note(database: Make) -> None:
    """As in the mount namespace of a service."""
    host, quiesced = Host(), database("/data", "/redo")
    quiesced.check(ready(("254:3", 0), ("", None)), host)
    (note,) = quiesced.around(host).notes
    assert note.startswith("whether /redo, which the database needs, is in this run was not checked: the host has no")


def test_what_is_in_memory_is_not_on_the_volume_of_the_data(database: Make) -> None:
    with pytest.raises(SourceError, match="not in this run: /redo on device 0:45"):
        database("/data", "/redo").check(ready(("254:3", 0), ("0:45", None)), Host())


@pytest.mark.parametrize(("hostname", "place"), [("guest", ("8:1", None)), (HERE, ("", None))])
def test_of_a_database_that_is_not_on_the_host_a_note_says_that_nothing_was_checked(
    database: Make, hostname: str, place: tuple[str, int | None]
) -> None:
    """In a guest, or a container, of the host: its paths mean nothing there."""
    host, quiesced = Host(), database("/data", hostname=hostname)
    quiesced.check(ready(place), host)
    (note,) = quiesced.around(host).notes
    assert note == (
        "whether all files of the database are in this run was not checked: it does not run on the host itself"
        f" but on {hostname}, with its data in /data"
    )


def test_without_a_database_there_is_nothing_to_check() -> None:
    assert Quiesce().directories == ()
    Quiesce().check(ready(), Host())


# --- the moment


@pytest.mark.parametrize(("freezes", "quiesced"), [(False, None), (True, Quiesced("freeze", 1.5))])
def test_the_moment_of_commands_alone(freezes: bool, quiesced: Quiesced | None) -> None:
    host = Host()
    assert Quiesce(freezes).around(host) == Moment(1.5, quiesced)
    assert host.taken == 1


def test_the_moment_of_a_lock_command(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host()
    monkeypatch.setattr(lockcommand, "around", lambda command, take: (take(), 2.5) if command == "lock it" else None)
    assert CommandQuiesce("lock it").around(host) == Moment(1.5, Quiesced("command", 2.5))
    assert host.taken == 1


def test_a_lock_command_that_fails_takes_nothing() -> None:
    host = Host()
    with pytest.raises(ProcessError, match="without executing what it was given"):
        CommandQuiesce("true").around(host)
    assert host.taken == 0


def test_the_moment_of_a_database(database: Make, mariadb: MariaDB) -> None:
    host = Host()
    moment = database("/data").around(host)
    assert host.taken == 1 and moment.took_s == 1.5
    assert moment.database is not None and moment.database.flavour == "mariadb"
    assert moment.quiesced is not None and moment.quiesced.by == "mysql"
    assert moment.quiesced.statements == ["BACKUP STAGE START", "BACKUP STAGE BLOCK_COMMIT"]
    mariadb.run("SET SESSION lock_wait_timeout=5", "INSERT INTO shop.innodb VALUES (0)")


# --- where a directory lies, on this machine


def test_a_directory_that_is_not_there_is_nowhere(tmp_path: Path) -> None:
    assert sources.locate(str(tmp_path / "none"), []) == ("", None)


def test_a_directory_is_on_none_of_no_devices(tmp_path: Path) -> None:
    number = tmp_path.stat().st_dev
    assert sources.locate(str(tmp_path), []) == (f"{os.major(number)}:{os.minor(number)}", None)


def test_a_directory_in_memory_is_on_no_device(tmp_path: Path) -> None:
    with mounts.tmpfs(tmp_path / "memory") as path:
        device, index = sources.locate(str(path), ["/dev/null"])
        assert device.startswith("0:") and index is None


def test_a_directory_is_on_the_device_that_is_mounted_there(tmp_path: Path) -> None:
    with (
        loop.mounted(tmp_path / "a.img", tmp_path / "a") as first,
        loop.mounted(tmp_path / "b.img", tmp_path / "b") as second,
    ):
        (tmp_path / "b" / "data").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "b" / "data")
        (tmp_path / "device").symlink_to(second)
        number = second.stat().st_rdev
        shown = f"{os.major(number)}:{os.minor(number)}"
        both = [str(first), str(second)]
        assert sources.locate(f"{tmp_path}/b/data", both) == (shown, 1)
        assert sources.locate(f"{tmp_path}/link", both[::-1]) == (shown, 0)
        assert sources.locate(f"{tmp_path}/b", [str(first)]) == (shown, None)
        assert sources.locate(f"{tmp_path}/b", [str(first), f"{tmp_path}/device"]) == (shown, 1)


def test_a_device_that_is_made_of_others_is_on_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system in an encrypted volume lies on the volume: the kernel lists what each device is made of."""
    with loop.mounted(tmp_path / "image", tmp_path / "data") as device:
        number = device.stat().st_rdev
        shown = f"{os.major(number)}:{os.minor(number)}"
        for upper, lower in ((shown, "254:7"), (shown, "254:8"), ("254:8", f"{os.major(NULL)}:{os.minor(NULL)}")):
            directory = tmp_path / "sys" / "dev" / "block" / upper / "slaves" / lower
            directory.mkdir(parents=True)
            (directory / "dev").write_text(f"{lower}\n")
        (tmp_path / "sys" / "dev" / "block" / shown / "slaves" / "gone").mkdir()  # it was taken away just now
        monkeypatch.setattr(devices, "SYS", f"{tmp_path}/sys")
        assert sources.locate(f"{tmp_path}/data", ["/dev/zero", "/dev/null"]) == (shown, 1)
        assert sources.locate(f"{tmp_path}/data", ["/dev/zero"]) == (shown, None)
