"""A Linux kernel that is a process (User Mode Linux): its disks, its network, its power.

Programs run on it at the speed of this machine, without a hypervisor: ptrace(2) only takes over their system calls.
"""

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from ipaddress import IPv4Address
from pathlib import Path

from tests.lab.image import Image

#: A /30 of it for each machine: that of its network interface here, whose number nobody else has.
_NETWORKS = IPv4Address("10.64.0.0")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_END_TIMEOUT_S = 30


class Machine:
    """A machine that is on, as a context manager. Nothing of it is left afterwards, even if we are killed.

    Its root file system is a copy of the image's; `sizes` are those of its other disks in bytes, ``/dev/ubdb`` and so
    on. `directory` gets its ``console`` and what it needs besides. It is reached at `address`.
    """

    def __init__(self, image: Image, directory: Path, sizes: Sequence[int]) -> None:
        self._image = image
        self._directory = directory
        self._sizes = sizes

    def __enter__(self) -> "Machine":
        with ExitStack() as stack:
            self._disks = [_copy(self._image.disk, self._directory), *(_empty(self._directory, n) for n in self._sizes)]
            for disk in self._disks:
                stack.callback(os.close, disk)
            self._network, name = _tap()
            stack.callback(os.close, self._network)
            number = socket.if_nametoindex(name)
            here = _NETWORKS + (number << 2) + 1
            cpus = sorted(os.sched_getaffinity(0))
            self._cpu = cpus[number % len(cpus)]
            self.address = str(here + 1)
            self._arguments = [f"LAB_ADDRESS={self.address}/30", f"LAB_GATEWAY={here}"]
            _configure(name, f"{here}/30")
            self._on()
            stack.callback(self._off)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """The process that ends when the machine is off."""
        return self._process.pid

    def is_on(self) -> bool:
        """Return whether it runs."""
        return self._process.poll() is None

    def wait(self) -> None:
        """Wait until it is off, which it never is by itself."""
        self._process.wait()

    def reset(self) -> None:
        """Cut the power, and turn it on again; what the disks accepted is kept."""
        self._off()
        self._on()

    def _on(self) -> None:
        """Start the kernel in its own PID namespace: its processes, which are processes here, end with it.

        All share one CPU: only one of them runs at a time, and to hand over to another CPU takes three times as long.
        """
        self._ended, ours = os.pipe()
        disks = [f"ubd{number}=/proc/self/fd/{disk}" for number, disk in enumerate(self._disks)]
        command = [
            *("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child"),
            *("taskset", "--cpu-list", str(self._cpu)),
            *(str(self._image.kernel), "mem=1536M", *disks, f"vec0:transport=fd,fd={self._network},vec=0,depth=64"),
            *("root=/dev/ubda", "rw", "fsck.mode=skip", *self._arguments),
            *("con=null", "con0=null,fd:1", "console=tty0", "umid=lab", f"uml_dir={self._directory}"),
        ]
        environment = {**os.environ, "TMPDIR": str(self._directory), "LD_PRELOAD": str(self._image.preloaded)}
        try:
            with (self._directory / "console").open("ab") as console:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=console,
                    env=environment,
                    pass_fds=[*self._disks, self._network, ours],
                )
        finally:
            os.close(ours)

    def _off(self) -> None:
        """Cut the power; returns when all its processes have ended, which hold the other end of the pipe."""
        self._process.kill()
        self._process.wait(_END_TIMEOUT_S)
        with os.fdopen(self._ended, "rb") as ended:
            ended.read()


def _copy(disk: Path, directory: Path) -> int:
    with tempfile.NamedTemporaryFile(dir=directory) as file:
        subprocess.run(["cp", "--sparse=always", "--reflink=auto", str(disk), file.name], timeout=300, check=True)
        return os.open(file.name, os.O_RDWR)


def _empty(directory: Path, size: int) -> int:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.truncate(size)
        return os.dup(file.fileno())


def _tap() -> tuple[int, str]:
    """Return a network interface of this machine that exists as long as it is open: its descriptor and its name."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)  # the kernel must not wait for a packet
    request = struct.pack("16sH22x", b"bdlab%d", _IFF_TAP | _IFF_NO_PI)
    return tap, fcntl.ioctl(tap, _TUNSETIFF, request)[:16].rstrip(b"\0").decode()


def _configure(name: str, address: str) -> None:
    ip = shutil.which("ip") or "/sbin/ip"
    for words in (["address", "add", address, "dev", name], ["link", "set", name, "up"]):
        subprocess.run([ip, *words], timeout=60, check=True)
