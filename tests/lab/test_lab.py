"""The lab itself: what the other tests take for granted of the guest."""

from tests.lab.guest import Guest
from tests.lab.volumes import VolumeGroup


def test_commands_run_as_root_and_tell_their_output_and_status(guest: Guest) -> None:
    result = guest.run("id -u; cat; echo wrong >&2; exit 3", stdin="given\n", check=False)
    assert (result.returncode, result.stdout, result.stderr) == (3, "0\ngiven\n", "wrong\n")


def test_a_thick_snapshot_that_overflows_is_invalid(volume_group: VolumeGroup) -> None:
    origin = volume_group.volume("origin", "64M")
    volume_group.guest.run(f"lvcreate -q -s -pr -n taken -L 8M {origin}")
    assert volume_group.volumes()["taken"][4] == "a"
    volume_group.guest.run(f"dd if=/dev/urandom of={origin} bs=1M count=16 conv=fsync")
    assert volume_group.volumes()["taken"][4] == "I"
