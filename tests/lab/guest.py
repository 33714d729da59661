"""A booted guest: run commands in it, cut its power, reach its ports."""

import secrets
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.conftest import LARGE
from tests.lab.image import Image
from tests.lab.machine import Machine
from tests.relay import Relay

BOOT_TIMEOUT_S = 240.0


class GuestError(AssertionError):
    """A command in the guest failed or took too long, or the guest does not answer."""


class Guest:
    """A Debian machine, as a context manager; nothing of it is left afterwards.

    Its root file system is the image's, as new; `disks` are the sizes in bytes of its empty data disks, of which
    `devices` are the names. `options` make either transport of blockdiff find and trust it, `login` is
    ``root@127.0.0.1``, `port` is where its sshd answers, and `url(path)` is a SOURCE on it.
    """

    login = "root@127.0.0.1"

    def __init__(self, image: Image, disks: Sequence[int] = ()) -> None:
        self._image = image
        self._host_key = image.host_key
        self._sizes = disks
        self._ports: dict[int, int] = {}
        self.devices = [f"/dev/ubd{chr(ord('b') + number)}" for number in range(len(disks))]

    def __enter__(self) -> "Guest":
        with ExitStack() as stack:
            place = stack.enter_context(tempfile.TemporaryDirectory(prefix="blockdiff-lab-", dir=LARGE))
            self.directory = Path(place)
            shutil.copy(self._image.user_key, self.user_key)
            self._machine = stack.enter_context(Machine(self._image, self.directory, self._sizes))
            self._relays = stack.enter_context(ExitStack())
            self.port = self.forward(22)
            self._master: subprocess.Popen[bytes] | None = None
            stack.callback(self._disconnect)
            self._wait_until_up()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def pid(self) -> int:
        """The process that ends with the machine."""
        return self._machine.pid

    @property
    def console(self) -> str:
        """What the guest has written to its console so far."""
        return (self.directory / "console").read_text(errors="replace")

    @property
    def user_key(self) -> Path:
        return self.directory / "user_key"

    @property
    def known_hosts(self) -> Path:
        return self.directory / "known_hosts"

    @property
    def options(self) -> list[str]:
        return [f"IdentityFile={self.user_key}", f"UserKnownHostsFile={self.known_hosts}"]

    @property
    def arguments(self) -> list[str]:
        """The options as words for the `blockdiff backup` command line."""
        return [word for option in self.options for word in ("--ssh-option", option)]

    @property
    def ssh_command(self) -> list[str]:
        """The command line that gets a person in."""
        words = [word for option in self.options for word in ("-o", option)]
        return ["ssh", "-F", "none", "-p", str(self.port), *words, self.login]

    def url(self, path: str | Path, port: int | None = None) -> str:
        """Return a SOURCE; `port` is that of a relay, None for the sshd's own."""
        return f"ssh://{self.login}:{port or self.port}{path}"

    def trust(self, port: int, known_hosts: Path | None = None) -> None:
        """Let `known_hosts` know the guest's key under another port of 127.0.0.1."""
        with (known_hosts or self.known_hosts).open("a") as file:
            file.write(f"[127.0.0.1]:{port} {self._host_key}\n")

    def forward(self, guest_port: int) -> int:
        """Return the port of 127.0.0.1 on the test's machine that leads to a TCP port of the guest."""
        if guest_port not in self._ports:
            relay = self._relays.enter_context(Relay(guest_port, host=self._machine.address))
            self._ports[guest_port] = relay.port
        return self._ports[guest_port]

    def run(
        self, command: str, *, stdin: str = "", timeout_s: float = 60, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run a shell command as root; raises GuestError if it takes too long or, with `check`, if it fails."""
        done = self._run(command, stdin.encode(), timeout_s)
        result = subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())
        if check and result.returncode != 0:
            raise GuestError(f"{command}: exit status {result.returncode}: {result.stderr}{result.stdout}")
        return result

    def output(self, command: str, timeout_s: float = 60) -> str:
        """Run a shell command that must succeed; return its standard output without the last newline."""
        return self.run(command, timeout_s=timeout_s).stdout.rstrip("\n")

    def put(self, path: str, data: bytes) -> None:
        """Write a file of the guest."""
        done = self._run(f"cat > {shlex.quote(path)}", data, 120)
        if done.returncode != 0:
            raise GuestError(f"{path}: {done.stderr.decode()}")

    def get(self, path: str) -> bytes:
        """Return what a file of the guest holds."""
        done = self._run(f"cat {shlex.quote(path)}", b"", 120)
        if done.returncode != 0:
            raise GuestError(f"{path}: {done.stderr.decode()}")
        return done.stdout

    @contextmanager
    def started(self, command: str) -> "Iterator[subprocess.Popen[str]]":
        """Yield a shell command that runs meanwhile, with its pipes; it and all that it started end with it."""
        group = f"/sys/fs/cgroup/lab-{secrets.token_hex(4)}"
        remote = f"echo $$ > {group}/cgroup.procs && exec bash -c {shlex.quote(command)}"
        end = f"echo 1 > {group}/cgroup.kill; until rmdir {group}; do sleep 0.05; done"
        pipe = subprocess.PIPE
        self.run(f"mkdir {group}")
        with subprocess.Popen(self._through(remote), stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield process
            finally:
                process.kill()
                self.run(f"if test -d {group}; then {end}; fi 2>/dev/null")  # it has gone if the guest was rebooted

    def reboot(self) -> None:
        """Cut the power and turn it on again; returns when the guest answers. What its disks accepted is kept."""
        self._disconnect()
        self._machine.reset()
        self._wait_until_up()

    def wait(self) -> None:
        """Wait until the machine is off, which it never is by itself."""
        self._machine.wait()

    def _wait_until_up(self) -> None:
        """Wait until sshd answers and the boot is over."""
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while not self._answers():
            if not self._machine.is_on() or time.monotonic() > deadline:
                raise GuestError(f"the guest does not come up: {self.console[-4000:]}")
            time.sleep(0.05)
        self._connect(deadline)
        self.run("systemctl is-system-running --wait; udevadm settle", timeout_s=BOOT_TIMEOUT_S)

    def _answers(self) -> bool:
        """Return whether sshd greets; the relay takes the connection long before."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), 5) as sock:
                return sock.recv(4) == b"SSH-"
        except OSError:
            return False

    def _connect(self, deadline: float) -> None:
        """Open the connection that every command goes through: logging in takes longer than most of them."""
        self.known_hosts.write_text("")
        self.trust(self.port)
        command = [*self.ssh_command[:-1], "-o", "BatchMode=yes", "-M", "-S", str(self._control), "-N", self.login]
        log = self.directory / "ssh.log"
        with log.open("wb") as file:
            self._master = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        while not self._control.exists():
            if self._master.poll() is not None or time.monotonic() > deadline:
                raise GuestError(f"the guest does not let us in: {log.read_text()}")
            time.sleep(0.02)

    def _disconnect(self) -> None:
        if self._master is not None:
            self._master.kill()
            self._master.wait(30)
            self._master = None
        self._control.unlink(missing_ok=True)

    @property
    def _control(self) -> Path:
        return self.directory / "control"

    def _through(self, command: str) -> list[str]:
        return ["ssh", "-F", "none", "-S", str(self._control), "-o", "BatchMode=yes", self.login, command]

    def _run(self, command: str, stdin: bytes, timeout_s: float) -> "subprocess.CompletedProcess[bytes]":
        try:
            return subprocess.run(
                self._through(command), input=stdin, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise GuestError(f"{command}: not done after {timeout_s} s; console: {self.console[-2000:]}") from error
