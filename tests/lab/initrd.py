"""A small initrd for the guest: it loads what the disk needs and goes on there; Debian's own takes far longer."""

import stat
from pathlib import Path
from subprocess import check_output

# Once in a few hundred boots under load the guest stood still for minutes after /init had begun, and a timer that the
# emulation lost is the suspect: the loop does not sleep, and says what it waits for.
_MODULES = "crc32c_intel virtio_pci virtio_blk ext4"
_INIT = """\
#!/busybox sh
/busybox mount -t devtmpfs dev /dev
for module in {modules}; do /busybox insmod /$module; done
echo waiting for the disk
until [ -b /dev/vda ]; do :; done
echo mounting the disk
/busybox mount -t ext4 -o noatime /dev/vda /new
/busybox mount --move /dev /new/dev
exec /busybox switch_root /new /sbin/init
"""


def initrd(root: Path) -> bytes:
    """Return an initrd (a cpio archive) made of files of a root file system that has busybox-static and a kernel."""
    modules = _modules(root)
    init = _INIT.format(modules=" ".join(path.name for path in modules))
    archive = [_entry("dev", stat.S_IFDIR | 0o755), _entry("new", stat.S_IFDIR | 0o755)]
    archive.append(_entry("init", stat.S_IFREG | 0o755, init.encode()))
    archive.append(_entry("busybox", stat.S_IFREG | 0o755, (root / "bin/busybox").read_bytes()))
    archive += [_entry(path.name, stat.S_IFREG | 0o644, path.read_bytes()) for path in modules]
    return b"".join([*archive, _entry("TRAILER!!!", 0)])


def _modules(root: Path) -> list[Path]:
    """Return the kernel modules to load, in order, each behind those that it needs."""
    (version,) = (path.name for path in (root / "lib/modules").iterdir())
    found: dict[Path, None] = {}
    for module in _MODULES.split():
        command = ["chroot", str(root), "modprobe", "--set-version", version, "--show-depends", module]
        for line in check_output(command, text=True, timeout=60).splitlines():
            kind, path = line.split()[:2]
            if kind == "insmod":
                found[root / path.lstrip("/")] = None
    return list(found)


def _entry(name: str, mode: int, data: bytes = b"") -> bytes:
    """Return one member of a cpio archive in the format `newc`."""
    path = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(path), 0)
    head = b"070701" + b"".join(b"%08x" % field for field in fields) + path
    return head + bytes(-len(head) % 4) + data + bytes(-len(data) % 4)
