"""The backup script and the crontab line of 2010, started by a real cron; the guest is server and host at once."""

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.lab import server
from tests.lab.guest import Guest
from tests.lab.mariadb import GuestMariaDB
from tests.lab.volumes import VolumeGroup

PASSWORD = "Ohne7Pech"
SCRIPT = """\
#!/bin/sh
YEARMONTH=`date +%Y%m`
blockdiff_backup /var/backup/srv00-pv-lv-$YEARMONTH ssh_lvm_dump --gzip root@srv00 /dev/pv/lv || exit $?
BLOCKSIZE=16384 LVCREATE_PREFIX='mysqllock --host=db00 --user=root --password={password}' \\
  blockdiff_backup /var/backup/db00-pv-lv-$YEARMONTH ssh_lvm_dump --gzip root@db00 /dev/pv/lv || exit $?
"""
ENTRY = (
    "5 3 * * * cd /var/backup && exec setlock -nX /tmp/backup.lock"
    " cronlog -l /var/backup/backup.log -t -- ./backup.sh 2>&1"
)
# what cron gives to the mail system: the message whole, or none
SENDMAIL = "#!/bin/sh\ncat > /var/backup-mail/.new && mv /var/backup-mail/.new /var/backup-mail/$$\n"

LOG = "/var/backup/backup.log"
SNAPSHOT = r"/dev/pv/bd_[0-9a-f]{16}"
VOLUME_SIZE = "96M"
RUN_TIMEOUT_S = 400


class Machine:
    """Server and host in one: a database on the volume ``/dev/pv/lv``, root's crontab, and ``/var/backup``."""

    def __init__(self, guest: Guest, group: VolumeGroup) -> None:
        self.guest = guest
        self.group = group
        self.directory = group.mounted(group.volume("lv", VOLUME_SIZE))
        self.database = GuestMariaDB(guest, f"{self.directory}/mysql")

    def begin(self) -> None:
        """Start the database, and make what the administrator makes once."""
        self.database.client(
            f"GRANT ALL ON *.* TO root@'%' IDENTIFIED BY '{PASSWORD}'; CREATE DATABASE diary;"
            " CREATE TABLE diary.innodb (day INT PRIMARY KEY) ENGINE=InnoDB;"
            " CREATE TABLE diary.myisam (day INT PRIMARY KEY) ENGINE=MyISAM"
        )
        self.guest.put("/usr/sbin/sendmail", SENDMAIL.encode())
        self.guest.run(
            "mkdir -m 700 -p /var/backup /var/backup-mail && chmod 755 /usr/sbin/sendmail && crontab -",
            stdin=f"PATH={server.PATH}\n{ENTRY}\n",
        )
        self.guest.put("/var/backup/backup.sh", SCRIPT.format(password=PASSWORD).encode())
        self.guest.run("chmod 700 /var/backup/backup.sh")

    def end(self) -> None:
        """Undo `begin`, and tell the guest the time that it is."""
        self.guest.run(
            "crontab -r; rm -rf /var/backup /var/backup-mail /usr/sbin/sendmail /tmp/backup.lock;"
            f" date -s @{time.time():.0f}; systemctl restart cron"
        )

    def write(self, day: int) -> None:
        """Write the day into both tables, one of which knows nothing of recovery."""
        self.database.client(f"INSERT INTO diary.innodb VALUES ({day}); INSERT INTO diary.myisam VALUES ({day})")

    def shortly_before(self, date: str) -> None:
        """Make it some seconds before the line is due. A cron that was running would take the jump for a mistake.

        One that starts within the minute of a line leaves that out.
        """
        self.guest.run(f"date -s '{date} 03:04:40' && systemctl restart cron")

    def wait_for_run(self, number: int) -> list[str]:
        """Wait until cron is done with the run of this number, the mail included; return the run's lines in the log."""
        self.guest.run(
            f"until [ $(grep -c ' starting: ' {LOG}) = {number} ]; do sleep 0.5; done 2>/dev/null;"
            " until [ $(wc -l < /sys/fs/cgroup/system.slice/cron.service/cgroup.procs) = 1 ]; do sleep 0.5; done",
            timeout_s=RUN_TIMEOUT_S,
        )
        return re.split(r"^-{78}\n", self.log(), flags=re.MULTILINE)[number].splitlines()

    def log(self) -> str:
        return self.guest.output(f"cat {LOG}")

    def mails(self) -> list[str]:
        """Return the mails that cron has sent."""
        names = self.guest.output("ls /var/backup-mail").split()
        return [self.guest.output(f"cat /var/backup-mail/{name}") for name in names]

    def files(self) -> list[str]:
        return self.guest.output("ls /var/backup").split()

    def restored(self, source: str, target: str) -> None:
        """Restore a generation onto a fresh volume."""
        self.guest.run(
            server.command("blockdiff", "restore", f"/var/backup/{source}", self.fresh(target)), timeout_s=200
        )

    def fresh(self, name: str) -> str:
        """Return a new volume without content."""
        path = self.group.volume(name, VOLUME_SIZE)
        self.guest.run(f"blkdiscard -z {path}")
        return path

    def merged(self, source: str, target: str) -> None:
        """Apply a delta to a volume by hand."""
        merge = server.command("blockdiff_merge", target)
        self.guest.run(f"set -o pipefail; gunzip -c /var/backup/{source} | {merge}", timeout_s=200)

    def days(self, name: str) -> list[str]:
        """Return what a database on the volume `name` knows of the days, and what it says of its tables."""
        where = f"/mnt/restored-{name}"
        self.guest.run(f"mkdir -p {where} && mount {self.group.path(name)} {where}")
        socket = "/run/mysqld/restored.sock"
        with GuestMariaDB(self.guest, f"{where}/mysql", guest_port=3307, socket=socket) as database:
            shown = database.client(
                "SELECT CONCAT_WS(' ', 'innodb', day) FROM diary.innodb ORDER BY day;"
                " SELECT CONCAT_WS(' ', 'myisam', day) FROM diary.myisam ORDER BY day;"
                " CHECK TABLE diary.innodb, diary.myisam EXTENDED"
            )
        self.guest.run(f"umount {where}")
        return shown.splitlines()


@pytest.fixture
def machine(guest: Guest) -> Iterator[Machine]:
    """The machine of the article; everything of it is gone after the test."""
    with ExitStack() as stack:
        stack.enter_context(server.installed(guest))
        group = stack.enter_context(VolumeGroup(guest, guest.devices[0], "pv"))
        made = Machine(guest, group)
        stack.enter_context(made.database)
        stack.callback(made.end)
        made.begin()
        yield made


def assert_lines(lines: list[str], date: str, *patterns: str) -> None:
    """Each line has the date in front, and is as its pattern says."""
    stamp = date.join((r"\[", r" 03:[0-5]\d:[0-5]\d 2026\] "))
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.fullmatch(stamp + pattern, line), "\n".join((pattern, *lines))


def dumped(login: str, *locking: str) -> tuple[str, ...]:
    """Return the lines of one volume's backup, as patterns."""
    return (
        r"the snapshot of pv/lv gets [0-9]+ MiB",
        r"creating snapshot\.\.\.",
        *locking,
        rf'running: ssh_blockdiff_dump --gzip "{login}" "{SNAPSHOT}"\.\.\.',
        rf"removing snapshot {SNAPSHOT}\.\.\.",
        "backup completed successfully",
    )


STARTING = r"lab starting: \./backup\.sh"
LOCKING = (
    "issuing lock statement: BACKUP STAGE START",
    "issuing lock statement: BACKUP STAGE BLOCK_COMMIT",
    "issuing unlock statement: BACKUP STAGE END",
)
ALL_WELL = (STARTING, *dumped("root@srv00"), *dumped("root@db00", *LOCKING), "command exited with code:0")


@pytest.mark.timeout(1800)
def test_the_crontab_of_2010_makes_backups_that_restore(machine: Machine) -> None:
    guest = machine.guest
    machine.write(1)
    machine.shortly_before("2026-11-21")
    assert_lines(machine.wait_for_run(1), "Sat Nov 21", *ALL_WELL)

    machine.write(2)
    with machine.group.locked():
        machine.shortly_before("2026-11-22")
        guest.run(f"until [ $(grep -c ' starting: ' {LOG}) = 2 ]; do sleep 0.2; done", timeout_s=RUN_TIMEOUT_S)
        again = guest.run(f"PATH={server.PATH}; {ENTRY.removeprefix('5 3 * * * ')}", check=False)
        assert again.stdout == "setlock: fatal: unable to lock /tmp/backup.lock: temporary failure\n", again
        assert len(re.findall(" starting: ", machine.log())) == 2
    assert_lines(machine.wait_for_run(2), "Sun Nov 22", *ALL_WELL)

    assert machine.mails() == []
    assert len(re.findall("-" * 78, machine.log())) == 2
    names = [f"{host}-pv-lv-202611" for host in ("db00", "srv00")]
    expected = {f"{name}.{number}.{suffix}" for name in names for number in "12" for suffix in ("gz", "json", "md5")}
    assert set(machine.files()) == {*expected, *(f"{name}.ver" for name in names), "backup.log", "backup.sh"}
    for name, block_size in zip(names, (16384, 1 << 20), strict=True):
        assert guest.output(f"cat /var/backup/{name}.ver") == "2"
        for number in (1, 2):
            head = guest.output(f"gunzip -c /var/backup/{name}.{number}.gz | head -c 4 | od -An -t u4")
            assert int(head) == block_size
        assert set(machine.group.volumes()) == {"lv"}
    assert guest.output(f"grep -rl {PASSWORD} /var/backup").split() == ["/var/backup/backup.sh"]

    by_hand = machine.fresh("hand")
    for day in (1, 2):
        restored = f"day{day}"
        machine.restored(f"db00-pv-lv-202611@{day}", restored)
        machine.merged(f"db00-pv-lv-202611.{day}.gz", by_hand)
        guest.run(f"cmp {by_hand} {machine.group.path(restored)}", timeout_s=200)
        days = [f"{engine} {number}" for engine in ("innodb", "myisam") for number in range(1, day + 1)]
        sound = [f"diary.{engine}\tcheck\tstatus\tOK" for engine in ("innodb", "myisam")]
        assert machine.days(restored) == [*days, *sound]
    machine.restored("srv00-pv-lv-202611@2", "other")
    assert machine.days("other")[:2] == ["innodb 1", "innodb 2"]  # no lock: of MyISAM nothing was promised


@pytest.mark.timeout(900)
def test_a_run_that_fails_is_mailed_as_it_was_logged_and_without_the_password(machine: Machine) -> None:
    machine.database.client("SET PASSWORD FOR root@'%' = PASSWORD('changed')")
    machine.shortly_before("2026-11-23")
    lines = machine.wait_for_run(1)
    head = (STARTING, *dumped("root@srv00"), *dumped("root@db00")[:2])
    assert_lines(lines[: len(head)], "Mon Nov 23", *head)
    assert "] blockdiff: cannot log in to the database on db00:3306 as root: Access denied" in lines[len(head)], lines
    assert_lines(
        lines[-2:],
        "Mon Nov 23",
        "blockdiff: ssh_lvm_dump exited with status 1; the chain is as it was",
        "command exited with code:1",
    )
    (mail,) = machine.mails()
    headers, _, body = mail.partition("\n\n")
    assert re.search(r"^To: root$", headers, re.MULTILINE) and ENTRY.removeprefix("5 3 * * * ") in headers
    assert ["-" * 78, *body.splitlines()] == machine.log().splitlines()
    assert "srv00-pv-lv-202611.ver" in machine.files() and "db00-pv-lv-202611.ver" not in machine.files()
    assert machine.guest.output(f"grep -rl {PASSWORD} /var/backup /var/backup-mail").split() == [
        "/var/backup/backup.sh"
    ]
    assert set(machine.group.volumes()) == {"lv"}
