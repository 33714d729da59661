"""Fake commands of LVM, dmsetup and thin_delta. They have a state in a JSON file, and can be told to fail, hang or lie.

`FakeLvm` makes a directory of commands for the PATH. Each of them runs this file, which needs only the standard
library.
"""

import fcntl
import json
import re
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

Row = dict[str, str]

NAMES = ("lvmconfig", "lvs", "lvcreate", "lvremove", "lvextend", "lvchange", "dmsetup", "thin_delta")
COLUMNS = ("pool_lv", "metadata_lv", "origin", "origin_uuid", "lv_tags", "data_percent", "metadata_percent", "thin_id")
EXTENT = 4 << 20
TERM = re.compile(r'(\w+)(=~|=)(\{?)"([^"]*)"\}?')


class State(TypedDict):
    """The state of the fake host. `groups` has the free bytes of each group, `orders` behaviours and how many times."""

    groups: dict[str, int]
    volumes: list[Row]
    orders: dict[str, tuple[str, int]]
    held: str
    delta: str
    external: bool
    threshold: str


def new_uuid() -> str:
    """Return a UUID as LVM writes it."""
    digits = uuid.uuid4().hex + uuid.uuid4().hex
    return "-".join(digits[i:j] for i, j in ((0, 6), (6, 10), (10, 14), (14, 18), (18, 22), (22, 26), (26, 32)))


def mapper(group: str, name: str) -> str:
    """Return the path of a volume's device under /dev/mapper."""
    return "/dev/mapper/{}-{}".format(group.replace("-", "--"), name.replace("-", "--"))


class FakeLvm:
    """The state of a fake host: groups and volumes, what the commands are ordered to do, and which were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.commands = directory / "commands"
        self.commands.mkdir(parents=True)
        for name in NAMES:
            script = self.commands / name
            script.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {directory} {name} "$@"\n')
            script.chmod(0o755)
        self._write(
            {"groups": {}, "volumes": [], "orders": {}, "held": "-", "delta": "", "external": False, "threshold": "100"}
        )
        (directory / "calls").touch()

    @contextmanager
    def state(self) -> Iterator[State]:
        """Yield the state, to read and change it. A lock keeps the commands from changing it at the same time."""
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            state: State = json.loads((self.directory / "state").read_text())
            yield state
            self._write(state)

    def _write(self, state: State) -> None:
        (self.directory / "state.new").write_text(json.dumps(state))
        (self.directory / "state.new").rename(self.directory / "state")

    def add_group(self, name: str, free: int) -> None:
        """Add a volume group with free space in bytes."""
        with self.state() as state:
            state["groups"][name] = free

    def add(self, group: str, name: str, **fields: str) -> Row:
        """Add a volume, and return its row. It is active, linear and has 100 MiB; `fields` change columns of `lvs`."""
        row = new_row(group, name, 100 << 20)
        row.update(fields)
        with self.state() as state:
            state["volumes"].append(row)
        return row

    def add_thin(self, group: str, name: str, **fields: str) -> Row:
        """Add a volume in the thin pool ``pool``, which is created if it does not exist."""
        with self.state() as state:
            there = any(row["vg_name"] == group and row["lv_name"] == "pool" for row in state["volumes"])
        if not there:
            self.add(group, "pool", segtype="thin-pool", metadata_lv="[pool_tmeta]", lv_attr="twi-aotz--")
            self.set("pool", data_percent="10.00", metadata_percent="5.00")
            self.add(group, "[pool_tmeta]", segtype="linear", lv_attr="ewi-ao----", lv_path="")
        thin = {"segtype": "thin", "pool_lv": "pool", "thin_id": "1", "lv_attr": "Vwi-aotz--"}
        thin.update(fields)
        return self.add(group, name, **thin)

    def add_file(self, group: str, name: str, content: bytes, **fields: str) -> Path:
        """Add a volume whose device is a plain file, and return its path. A snapshot of it is a copy of the file."""
        path = self.directory / group / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        self.add(group, name, lv_size=str(len(content)), lv_path=str(path), **fields)
        return path

    def snapshots(self) -> list[str]:
        """Return the names of the snapshots that exist, as volumes or as files."""
        files = [path.name for path in self.directory.glob("*/bd_*")]
        return sorted({*files, *(name for name in self.names() if name.startswith("bd_"))})

    def set(self, name: str, **fields: str) -> None:
        """Change columns of the volume `name`."""
        with self.state() as state:
            for row in state["volumes"]:
                if row["lv_name"] == name:
                    row.update(fields)

    def order(self, command: str, behaviour: str, times: int = 1000) -> None:
        """Let the next `times` calls of a command behave like the function `behaviour` (at the end of this file)."""
        with self.state() as state:
            state["orders"][command] = (behaviour, times)

    def names(self) -> list[str]:
        """Return the names of all volumes."""
        with self.state() as state:
            return [row["lv_name"] for row in state["volumes"]]

    def row(self, name: str) -> Row:
        """Return the row of a volume."""
        with self.state() as state:
            (row,) = [row for row in state["volumes"] if row["lv_name"] == name]
        return dict(row)

    def calls(self, command: str = "") -> list[list[str]]:
        """Return the calls of a command, or of all commands, in order, without the command's name."""
        lines = [json.loads(line) for line in (self.directory / "calls").read_text().splitlines()]
        return [line[1:] if command else line for line in lines if command in ("", line[0])]

    def go(self) -> None:
        """Let commands that were ordered to wait continue."""
        (self.directory / "go").touch()


def new_row(group: str, name: str, size: int) -> Row:
    """Return the columns of a plain active volume."""
    plain = name.strip("[]")
    row = dict.fromkeys(COLUMNS, "")
    row.update(lv_uuid=new_uuid(), lv_name=name, vg_name=group, lv_size=str(size), lv_attr="-wi-a-----")
    row.update(lv_path=f"/dev/{group}/{plain}", lv_dm_path=mapper(group, plain), segtype="linear")
    row.update(lv_snapshot_invalid="", vg_extent_size=str(EXTENT), lv_time="2026-11-01 03:05:00 +0000")
    return row


class Fail(Exception):  # noqa: N818
    """A command prints this message and ends with status 5."""


class Command:
    """One call of one of the commands."""

    def __init__(self, fake: FakeLvm, arguments: list[str]) -> None:
        self.fake = fake
        self.arguments = arguments

    def option(self, name: str) -> str:
        return self.arguments[self.arguments.index(name) + 1] if name in self.arguments else ""

    def options(self, name: str) -> list[str]:
        return [after for before, after in zip(self.arguments, self.arguments[1:], strict=False) if before == name]

    def place(self) -> tuple[str, str]:
        """Return the group and the volume that the last argument names; ``""`` stands for all of them."""
        if self.arguments[-2:-1] == ["-o"]:
            return "", ""
        path = self.arguments[-1]
        with self.fake.state() as state:
            for row in state["volumes"]:
                names = (row["lv_path"], row["lv_dm_path"], f"{row['vg_name']}/{row['lv_name']}")
                if path in names:
                    return row["vg_name"], row["lv_name"]
            if path.replace("/dev/", "") in state["groups"]:
                return path.replace("/dev/", ""), ""
        raise Fail(f'  Failed to find logical volume "{path}"')

    def selected(self) -> list[Row]:
        group, name = self.place()
        with self.fake.state() as state:
            rows = [row for row in state["volumes"] if group in ("", row["vg_name"]) and name in ("", row["lv_name"])]
            return [row for row in rows if self.is_selected(row)]

    def is_selected(self, row: Row) -> bool:
        for term in filter(None, self.option("-S").split(" && ")):
            match = TERM.fullmatch(term)
            assert match, term
            field, operator, braces, value = match.groups()
            held = row[field].strip("[]")
            if braces:
                good = value in held.split(",")
            else:
                good = re.search(value, held) is not None if operator == "=~" else held == value
            if not good:
                return False
        return True

    def lvs(self) -> None:
        fields = self.option("-o").split(",")
        with self.fake.state() as state:
            free = state["groups"]
        rows = [{**row, "vg_free": str(free[row["vg_name"]])} for row in self.selected()]
        report = [{field: row[field] for field in fields} for row in rows]
        print(json.dumps({"report": [{"lv": report}]}))

    def lvmconfig(self) -> None:
        assert self.arguments == ["--type", "full", "activation/thin_pool_autoextend_threshold"]
        with self.fake.state() as state:
            print(f"thin_pool_autoextend_threshold={state['threshold']}")

    def lvcreate(self, half: bool = False) -> None:
        group, name = self.place()
        with self.fake.state() as state:
            (origin,) = [row for row in state["volumes"] if (row["vg_name"], row["lv_name"]) == (group, name)]
            row = new_row(group, self.option("-n"), int(origin["lv_size"]))
            row.update(origin=name, origin_uuid=origin["lv_uuid"], lv_tags=",".join(self.options("--addtag")))
            if origin["segtype"] == "thin":
                ids = [int(other["thin_id"]) for other in state["volumes"] if other["thin_id"]]
                thin_id = next(number for number in range(1, 1000) if number not in ids)
                row.update(segtype="thin", pool_lv=origin["pool_lv"], thin_id=str(thin_id), lv_attr="Vri-a-tz--")
            else:
                size = self.amount()
                if size > state["groups"][group]:
                    raise Fail(f'  Volume group "{group}" has insufficient free space')
                state["groups"][group] -= size
                row.update(lv_size=str(size), data_percent="0.00", lv_attr="sri-a-s---")
                if half:
                    row.update(origin="", origin_uuid="", data_percent="", lv_attr="-wi-------")
            if Path(origin["lv_path"]).is_file():
                row["lv_path"] = str(Path(origin["lv_path"]).with_name(row["lv_name"]))
                shutil.copyfile(origin["lv_path"], row["lv_path"])
            state["volumes"].append(row)
        if half:
            raise Fail(f"  Failed to suspend logical volume {group}/{name}.\n  Aborting. Manual intervention required.")

    def amount(self) -> int:
        wanted = int(self.option("-L").strip("+b"))
        if wanted % 512:
            raise Fail("  Size is not a multiple of 512.\n  Error during parsing of command line.")
        return -(-wanted // EXTENT) * EXTENT

    def lvremove(self) -> None:
        gone = [row["lv_uuid"] for row in self.selected()]
        with self.fake.state() as state:
            for row in state["volumes"]:
                if row["lv_uuid"] in gone and Path(row["lv_path"]).is_file():
                    Path(row["lv_path"]).unlink()
            state["volumes"] = [row for row in state["volumes"] if row["lv_uuid"] not in gone]

    def lvextend(self) -> None:
        group, name = self.place()
        more = self.amount()
        with self.fake.state() as state:
            if more > state["groups"][group]:
                raise Fail("  Insufficient free space")
            state["groups"][group] -= more
            for row in state["volumes"]:
                if row["lv_name"] == name:
                    row["data_percent"] = str(
                        float(row["data_percent"]) * int(row["lv_size"]) / (int(row["lv_size"]) + more)
                    )
                    row["lv_size"] = str(int(row["lv_size"]) + more)

    def lvchange(self) -> None:
        _, name = self.place()
        with self.fake.state() as state:
            for row in state["volumes"]:
                if row["lv_name"] == name:
                    tags = [tag for tag in row["lv_tags"].split(",") if tag not in self.options("--deltag")]
                    row["lv_tags"] = ",".join(tags + self.options("--addtag"))

    def dmsetup(self) -> None:
        what, name = self.arguments[:2]
        with self.fake.state() as state:
            if what == "table":
                (row,) = [row for row in state["volumes"] if row["lv_dm_path"].endswith("/" + name)]
                origin = " 253:9" if state["external"] else ""
                print("0 {} thin 253:4 {}{}".format(int(row["lv_size"]) // 512, row["thin_id"], origin))
            elif what == "status":
                print(
                    f"0 2048 thin-pool 1 13/1024 10/1600 {state['held']} rw discard_passdown queue_if_no_space - 1024"
                )
            elif self.arguments[3] == "reserve_metadata_snap":
                if state["held"] != "-":
                    raise Fail("device-mapper: message ioctl on failed: Device or resource busy")
                state["held"] = "13"
            else:
                state["held"] = "-"

    def thin_delta(self) -> None:
        with self.fake.state() as state:
            if state["held"] == "-":
                raise Fail("no current metadata snap\nUsage: thin_delta [options] <device or file>")
            print(state["delta"].format(left=self.option("--thin1"), right=self.option("--thin2")))


def wait_for_go(fake: FakeLvm) -> None:
    """Report that the command has begun, and wait for `FakeLvm.go`. Like LVM, it stops waiting on SIGINT."""

    def give_up(_number: int, _frame: object) -> None:
        raise Fail("  Giving up waiting for lock.")

    signal.signal(signal.SIGINT, give_up)
    (fake.directory / "waiting").touch()
    while not (fake.directory / "go").exists():
        time.sleep(0.005)


def fail(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: do nothing, and fail."""
    raise Fail("  Something is wrong.")


def fail_after(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: do it, and nevertheless fail."""
    run()
    raise Fail("  Something went wrong in the end.")


def half(fake: FakeLvm, run: Callable[..., None]) -> None:
    """Order: create the volume for the changes, but do not turn it into a snapshot, and fail."""
    run(half=True)


def lie(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: do nothing, and succeed."""


def late(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: wait for another command's lock, then do it."""
    wait_for_go(fake)
    run()


def late_after(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: do it, then wait."""
    run()
    wait_for_go(fake)


def warn(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: do it, between two warnings."""
    print("  WARNING: Device for PV zzz not found or rejected by a filter.", file=sys.stderr)
    run()
    print("  WARNING: dmeventd is not what it was.", file=sys.stderr)


def gibberish(fake: FakeLvm, run: Callable[[], None]) -> None:
    """Order: print something else, and succeed."""
    print("lvs: the lives of others")


ORDERS = {order.__name__: order for order in (fail, fail_after, half, lie, late, late_after, warn, gibberish)}


def main(directory: str, name: str, *arguments: str) -> int:
    """Run one command."""
    fake = FakeLvm.__new__(FakeLvm)
    fake.directory = Path(directory)
    command = Command(fake, list(arguments))
    with fake.state() as state:
        with (fake.directory / "calls").open("a") as calls:
            calls.write(json.dumps([name, *arguments]) + "\n")
        behaviour, times = state["orders"].get(name, ("", 0))
        if times:
            state["orders"][name] = (behaviour, times - 1)
    try:
        if times:
            ORDERS[behaviour](fake, getattr(command, name))
        else:
            getattr(command, name)()
    except Fail as error:
        print(error, file=sys.stderr)
        return 5
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
