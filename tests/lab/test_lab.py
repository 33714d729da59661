"""The lab itself: what the other tests take for granted of the guest."""

import os
import select
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lab import image
from tests.lab.guest import Guest, GuestError
from tests.lab.volumes import VolumeGroup


def test_commands_run_as_root_and_tell_their_output_and_status(guest: Guest) -> None:
    result = guest.run("id -u; cat; echo wrong >&2; exit 3", stdin="given\n", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "0\ngiven\n", "wrong\n")


def test_a_command_that_fails_raises_what_it_said(guest: Guest) -> None:
    with pytest.raises(GuestError, match="exit status 7: no way"):
        guest.run("echo no way >&2; exit 7")


def test_a_command_that_does_not_end_raises_at_its_deadline(guest: Guest) -> None:
    with pytest.raises(GuestError, match="not done after 1 s"):
        guest.run("exec sleep 1000", timeout_s=1)


def test_files_go_in_and_out(guest: Guest) -> None:
    data = os.urandom(100_000)
    guest.put("/run/a file", data)
    assert guest.get("/run/a file") == data


def test_what_was_started_ends_with_its_context(guest: Guest) -> None:
    with guest.started("sleep 98765 & echo going; cat") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        guest.run("until pgrep -f '^sleep 98765'; do sleep 0.05; done")
    assert guest.run("pgrep -f '^sleep 98765'", check=False).returncode == 1


def test_a_port_of_the_guest_is_reached_from_here(guest: Guest) -> None:
    script = (
        "import socket; server = socket.create_server(('', 7000)); print('ready', flush=True);"
        " server.accept()[0].sendall(b'hello')"
    )
    with guest.started(f'exec python3 -c "{script}"') as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with socket.create_connection(("127.0.0.1", guest.forward(7000)), 30) as sock:
            sock.settimeout(30)
            assert sock.recv(100) == b"hello"


def test_a_thick_snapshot_that_overflows_is_invalid(volume_group: VolumeGroup) -> None:
    origin = volume_group.volume("origin", "64M")
    volume_group.guest.run(f"lvcreate -q -s -pr -n taken -L 8M {origin}")
    assert volume_group.volumes()["taken"][4] == "a"
    volume_group.guest.run(f"dd if=/dev/urandom of={origin} bs=1M count=16 conv=fsync")
    assert volume_group.volumes()["taken"][4] == "I"


def test_a_thin_snapshot_keeps_what_its_origin_held(volume_group: VolumeGroup) -> None:
    guest = volume_group.guest
    volume_group.pool("pool", "128M")
    origin = volume_group.thin("origin", "1G", "pool")
    guest.run(f"echo before > {origin}; lvcreate -q -s -kn -pr -n taken {origin}; echo behind > {origin}")
    assert guest.output(f"head -c 6 {volume_group.path('taken')}") == "before"


def test_all_of_a_volume_group_goes_whatever_a_test_left(guest: Guest) -> None:
    with VolumeGroup(guest, guest.devices[1], "with-hyphen.and_dot") as group:
        where = group.mounted(group.volume("in-use", "64M"))
        guest.run(f"lvcreate -q -s -n left -L 8M {group.path('in-use')}")
        guest.run(f"systemd-run -q --collect bash -c 'cd {where} && exec sleep 87654'")
        suspended = group.volume("suspended", "8M")
        guest.run(f"dmsetup suspend {suspended}")
    assert guest.output("dmsetup ls; grep hyphen /proc/mounts || true") == "No devices found"
    assert guest.output(f"blkid {guest.devices[1]} || echo empty") == "empty"
    with VolumeGroup(guest, guest.devices[1], "with-hyphen.and_dot") as group:
        assert group.volumes() == {}


def test_a_cut_of_the_power_loses_what_was_not_written(guest: Guest) -> None:
    with VolumeGroup(guest, guest.devices[1]) as group:
        volume = group.volume("volume", "64M")
        before = guest.output("cat /proc/sys/kernel/random/boot_id")
        guest.run(f"echo kept | dd of={volume} conv=fsync status=none; touch /run/lost")
        guest.reboot()
        assert guest.output("cat /proc/sys/kernel/random/boot_id") != before
        group.activate()
        assert guest.output(f"head -c 4 {volume}; test -e /run/lost || echo ' lost'") == "kept lost"


class Broken(Guest):
    """A guest that does not come up."""

    def _wait_until_up(self) -> None:
        raise GuestError("broken")


def test_nothing_is_left_of_a_guest_that_does_not_come_up(guest: Guest) -> None:
    broken = Broken(image.image(), [1 << 30])
    with pytest.raises(GuestError, match="broken"), broken:
        pass
    assert not broken.directory.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(broken.pid, 0)


def test_the_machine_and_its_disks_go_with_a_test_run_that_is_killed(guest: Guest) -> None:
    script = (
        "import time\n"
        "from tests.lab import guest, image\n"
        "class Halfway(guest.Guest):\n"
        "    def _wait_until_up(self):\n"
        "        while not self.console: time.sleep(0.01)\n"
        "        print(self.pid, self.directory, flush=True)\n"
        "        time.sleep(1000)\n"
        "with Halfway(image.image(), [1 << 30]): pass"
    )
    root = Path(__file__).resolve().parent.parent.parent
    with subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, directory = process.stdout.readline().split()
        machine = os.pidfd_open(int(pid))
        process.kill()
    try:
        assert select.select([machine], [], [], 30)[0], "it is still on"
        assert sum(path.stat().st_size for path in Path(directory).iterdir()) < 1 << 20
    finally:
        os.close(machine)
        shutil.rmtree(directory)
