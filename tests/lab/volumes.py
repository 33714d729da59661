"""Volume groups in the guest, and the volumes and file systems in them; all gone at the end."""

import secrets
import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from tests.lab.guest import Guest, GuestError

# A test may have left anything: processes, mounts, suspended devices, snapshots, volumes that LVM has forgotten.
_REMOVE = r"""
vg={vg} device={device}
of_group() {{ dmsetup info -c --noheadings -o name -S "vg_name=$vg" 2>/dev/null | grep -v '^No devices' || true; }}
for name in $(of_group); do dmsetup resume "$name"; done
for name in $(of_group); do
    findmnt -rno TARGET -S "/dev/mapper/$name" | while read -r target; do
        fuser -k -M -m "$target" >/dev/null 2>&1
        umount "$target" || umount -l "$target"
    done
done
vgremove -q -ff -y "$vg" >/dev/null 2>&1
for name in $(of_group); do dmsetup remove --force --retry "$name"; done
wipefs -q -a "$device"
blkdiscard -f "$device"
pvscan -q --cache "$device" >/dev/null 2>&1
left=$(of_group)
[ -z "$left" ] || {{ echo "left: $left" >&2; exit 1; }}
"""


class VolumeGroup:
    """A volume group on one data disk of the guest, as a context manager; at the end all that is in it goes.

    `name` is one that no other test has, unless given. Sizes are what LVM takes: ``64M``, ``1G``.
    """

    def __init__(self, guest: Guest, device: str, name: str = "") -> None:
        self.guest = guest
        self.device = device
        self.name = name or f"vg{secrets.token_hex(3)}"

    def __enter__(self) -> "VolumeGroup":
        self._remove()  # a test that was killed may have left one on this disk
        self.guest.run(f"vgcreate -q -y {shlex.quote(self.name)} {self.device}")
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self._remove()
        except GuestError:
            self.guest.reboot()  # or every test after this one would fail
            self._remove()
            raise

    def path(self, name: str) -> str:
        """Return the path of a volume."""
        return f"/dev/{self.name}/{name}"

    def volume(self, name: str, size: str) -> str:
        """Make a thick volume; return its path."""
        self.guest.run(f"lvcreate -q -y -Wn -n {name} -L {size} {shlex.quote(self.name)}")
        return self.path(name)

    def pool(self, name: str, size: str, *options: str) -> str:
        """Make a thin pool; return its name."""
        words = " ".join(options)
        self.guest.run(f"lvcreate -q -y --type thin-pool -n {name} -L {size} {words} {shlex.quote(self.name)}")
        return name

    def thin(self, name: str, size: str, pool: str) -> str:
        """Make a thin volume; return its path."""
        self.guest.run(f"lvcreate -q -y --type thin -n {name} -V {size} --thinpool {pool} {shlex.quote(self.name)}")
        return self.path(name)

    def activate(self) -> None:
        """Let all volumes be there; after a reboot udev does so, in its own time."""
        self.guest.run(f"vgchange -q -ay {shlex.quote(self.name)}")

    def mounted(self, path: str, where: str = "") -> str:
        """Make a file system on a volume and mount it; return the directory. It is unmounted with the group."""
        where = where or f"/mnt/{self.name}-{path.rsplit('/', 1)[1]}"
        self.guest.run(f"mkfs.ext4 -q -F {path} && mkdir -p {where} && mount {path} {where}")
        return where

    def volumes(self) -> dict[str, str]:
        """Return the attributes (``lv_attr``) of every visible volume by its name."""
        shown = self.guest.output(f"lvs --noheadings -o lv_name,lv_attr {shlex.quote(self.name)}")
        return dict(line.split()[:2] for line in shown.splitlines())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the group's lock, as an LVM command does while it works."""
        command = f"exec flock -x /run/lock/lvm/V_{self.name} sh -c 'echo locked; exec sleep 600'"
        with self.guest.started(command) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            yield

    def _remove(self) -> None:
        self.guest.run(_REMOVE.format(vg=shlex.quote(self.name), device=self.device), timeout_s=120)
