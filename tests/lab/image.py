"""Build the guest's disk image once and keep it outside the checkout; run as root."""

import configparser
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SUITE = "bookworm"
PACKAGES = (
    "user-mode-linux systemd-sysv udev kmod iproute2 procps psmisc busybox-static rsync"
    " openssh-server openssh-client lvm2 thin-provisioning-tools e2fsprogs cron daemontools python3 perl-base"
    " mariadb-server postgresql"
)
#: Where the server side of blockdiff finds the Python packages that it needs, in the guest.
PYTHON_PACKAGES = "/opt/blockdiff-packages"
#: A database directory as mariadb-install-db leaves it, in the guest: making one there takes long.
MARIADB_TEMPLATE = "/var/lib/mysql-template"
PROGRAMS = ("mmdebstrap", "unshare", "mkfs.ext4", "cc", "ip", "setpriv", "ssh", "ssh-keygen")

_HERE = Path(__file__).resolve().parent
_ROOTFS = _HERE / "rootfs"
_PRELOADED = _HERE / "preloaded.c"
_DISK_SIZE = 4 << 30
_BUILD_TIMEOUT_S = 1800
_KEPT_S = 24 * 3600  # an image that was used lately may be that of another checkout
# every unit costs its share of a second
_NOT_NEEDED = (
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer e2scrub_reap.service fstrim.timer"
    " mariadb.service postgresql.service rsync.service svscan.service systemd-timesyncd.service remote-fs.target"
    " getty.target blk-availability.service systemd-logind.service systemd-user-sessions.service systemd-pstore.service"
    " systemd-update-utmp.service systemd-update-utmp-runlevel.service systemd-sysusers.service systemd-sysctl.service"
    " systemd-random-seed.service systemd-modules-load.service systemd-binfmt.service systemd-remount-fs.service"
    " proc-sys-fs-binfmt_misc.automount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount"
    " sys-fs-fuse-connections.mount dev-hugepages.mount dev-mqueue.mount modprobe@.service"
    " systemd-journal-flush.service"
)


class Image(NamedTuple):
    """The files of a built image; nothing writes to them any more."""

    directory: Path

    @property
    def disk(self) -> Path:
        """The root file system, as a raw disk without partitions."""
        return self.directory / "disk"

    @property
    def kernel(self) -> Path:
        """The kernel, which is a program."""
        return self.directory / "linux"

    @property
    def preloaded(self) -> Path:
        """What is preloaded into it (``preloaded.c``)."""
        return self.directory / "preloaded.so"

    @property
    def user_key(self) -> Path:
        """The private key that lets root in."""
        return self.directory / "user_key"

    @property
    def host_key(self) -> str:
        """The type and the text of the guest's public host key, as known_hosts has them."""
        return (self.directory / "host_key.pub").read_text().strip()


class BuildError(Exception):
    """The image could not be built; says at which step, and what that printed last."""


def missing() -> str | None:
    """Return what this machine lacks to build and run the image, or None."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "Linux on x86-64"
    absent = [name for name in PROGRAMS if shutil.which(name, path=_PATH) is None]
    if absent:
        return "the programs " + ", ".join(absent)
    return "root" if os.getuid() != 0 else None


def image() -> Image:
    """Return the image, built before if it is not there yet (minutes); raises BuildError."""
    lack = missing()
    if lack is not None:
        raise BuildError(f"the lab needs {lack} (see tests/install-system-packages)")
    directory = _cache() / _key()
    with _locked(_cache()):
        if not directory.exists():
            _build_into(directory)
        os.utime(directory)
    return Image(directory)


def _cache() -> Path:
    given = os.environ.get("BLOCKDIFF_LAB_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "blockdiff-lab"


def _requirements() -> list[str]:
    """Return what blockdiff itself asks for; PyMySQL is there for the tests as well."""
    setup = configparser.ConfigParser()
    setup.read(_HERE.parent.parent / "setup.cfg")
    return sorted({*setup["options"]["install_requires"].split(), "PyMySQL>=1.0"})


def _key() -> str:
    """Return the name of the image that would be built now: all that it is built from, hashed."""
    digest = hashlib.sha256("\n".join(_requirements()).encode())
    for path in [Path(__file__), _PRELOADED, *sorted(path for path in _ROOTFS.rglob("*") if path.is_file())]:
        digest.update(f"\0{path.relative_to(_HERE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build_into(directory: Path) -> None:
    """Build the image and put it in its place; a failed one leaves nothing, and those long unused go."""
    cache = directory.parent
    for left in cache.glob("building-*"):  # the lock is ours: whoever made it is gone
        _remove(left)
    started = time.monotonic()
    place = Path(tempfile.mkdtemp(dir=cache, prefix="building-"))
    made, root = place / "image", place / "root"
    made.mkdir()
    try:
        with (made / "log").open("wb") as log:
            _say("installing Debian (some minutes)")
            _install(root, log.fileno())
            _say("installing Python packages")
            _install_python_packages(root, log.fileno())
            _say("making the disk")
            _configure(root, made, log.fileno())
            _make_disk(root, made, log.fileno())
        made.rename(directory)
    finally:
        _remove(place)
    for old in cache.iterdir():
        if old.is_dir() and old.stat().st_mtime < time.time() - _KEPT_S:
            _remove(old)
    _say(f"done in {time.monotonic() - started:.0f} s: {directory}")


def _remove(directory: Path) -> None:
    """Remove a directory, but never what is mounted in it."""
    below = f"{directory.resolve()}/"
    mounted = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    if any(path.startswith(below) for path in mounted):
        raise BuildError(f"{directory}: something is mounted in it; unmount that, then remove the directory")
    shutil.rmtree(directory)


def _install(root: Path, log: int) -> None:
    _run(
        "mmdebstrap",
        "--mode=root",
        "--variant=minbase",
        "--architectures=amd64",
        "--include=" + ",".join(PACKAGES.split()),
        '--aptopt=Acquire::Check-Valid-Until "false"',  # the mirror may be a snapshot of long ago
        "--dpkgopt=path-exclude=/usr/share/doc/*",
        "--dpkgopt=path-exclude=/usr/share/man/*",
        "--dpkgopt=path-exclude=/usr/share/locale/*",
        "--dpkgopt=force-confold",
        f"--essential-hook=sync-in {_ROOTFS} /",
        SUITE,
        root,
        *_mirrors(),
        log=log,
    )


def _mirrors() -> list[str]:
    """Return where this machine itself gets Debian from; nothing (mmdebstrap knows one) if it is no such Debian."""
    shown = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    wanted = {SUITE, f"{SUITE}-updates", f"{SUITE}-security"}
    found = sorted({tuple(line.split()) for line in shown.splitlines()})
    lines = [f"deb {site} {release} {part}" for site, release, part in found if release in wanted]
    return lines if any(f" {SUITE} " in line for line in lines) else []


def _install_python_packages(root: Path, log: int) -> None:
    """Put them where only those look who ask for them; the guest's Python is Debian's 3.11."""
    _run(
        *(sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--only-binary=:all:"),
        *("--implementation=cp", "--python-version=3.11"),
        *(f"--platform={name}_x86_64" for name in ("manylinux2014", "manylinux_2_28", "manylinux_2_34")),
        *("--target", root / PYTHON_PACKAGES.lstrip("/")),
        *_requirements(),
        log=log,
    )


def _configure(root: Path, made: Path, log: int) -> None:
    """What the files of `rootfs` cannot say: keys, services, and a database directory to copy."""
    (root / "etc/machine-id").write_text(hashlib.md5(b"lab").hexdigest() + "\n")
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", made / "user_key", log=log)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(made / "user_key.pub", root / "root/.ssh/authorized_keys")
    kind, text = (root / "etc/ssh/ssh_host_ed25519_key.pub").read_text().split()[:2]
    (made / "host_key.pub").write_text(f"{kind} {text}\n")
    # it may log in to itself, by the names in its own /etc/hosts
    shutil.copy(made / "user_key", root / "root/.ssh/id_ed25519")
    names = ",".join((_ROOTFS / "etc/hosts").read_text().split())
    (root / "root/.ssh/known_hosts").write_text(f"{names} {kind} {text}\n")
    _run("chroot", root, "systemctl", "mask", *_NOT_NEEDED.split(), log=log)
    _run("chroot", root, "systemctl", "enable", "lab-network.service", log=log)
    _run("chroot", root, "systemctl", "set-default", "multi-user.target", log=log)
    shutil.rmtree(root / "usr/lib/systemd/system-generators")
    _run(
        *("chroot", root, "mariadb-install-db", "--no-defaults", "--user=mysql", "--skip-test-db"),
        *("--auth-root-authentication-method=socket", "--auth-root-socket-user=root"),
        *(f"--datadir={MARIADB_TEMPLATE}", "--innodb-log-file-size=16M"),
        log=log,
    )


def _make_disk(root: Path, made: Path, log: int) -> None:
    shutil.move(root / "usr/bin/linux.uml", made / "linux")
    shutil.move(root / "usr/lib/uml/modules", root / "usr/lib/modules")
    _run("cc", "-O2", "-shared", "-fPIC", "-o", made / "preloaded.so", _PRELOADED, log=log)
    disk = made / "disk"
    with disk.open("wb") as file:
        file.truncate(_DISK_SIZE)
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-L", "lab", "-d", root, disk, log=log)


def _run(*command: str | Path, log: int) -> None:
    """Run one step of the build, its output goes to the log.

    What it mounts only it can see: mmdebstrap puts this machine's /dev into the tree, and whoever removes the tree of a
    build that was killed must not find it there.
    """
    try:
        subprocess.run(
            ["unshare", "--mount", "--propagation", "private", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PATH": _PATH, "DEBIAN_FRONTEND": "noninteractive"},
            timeout=_BUILD_TIMEOUT_S,
            check=True,
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = Path(f"/proc/self/fd/{log}").read_text(errors="replace").splitlines()
        raise BuildError("\n".join([f"the lab's image: {command[0]} failed", *said[-30:]])) from error


def _say(text: str) -> None:
    print(f"lab image: {text}", file=sys.stderr, flush=True)


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"

if __name__ == "__main__":
    try:
        image()
    except BuildError as error:
        sys.exit(str(error))
