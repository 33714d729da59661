"""A private sshd on loopback, which the tests start and stop."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from tests import processes


class Sshd:
    """A running sshd with its own keys. A context manager.

    `options` are the ssh options to log in to it and to trust it; `login` is ``user@127.0.0.1``. `extra` are lines for
    its configuration. `url(path)` is a SOURCE on it. Every process of a login has `mark` in its environment.
    """

    def __init__(self, directory: Path, extra: Sequence[str] = ()) -> None:
        self.directory = directory
        self.user = getpass.getuser()
        self.host_key = directory / "host_key"
        self.user_key = directory / "user_key"
        self.known_hosts = directory / "known_hosts"
        self.mark = processes.new_mark()
        self._extra = extra
        self._log = directory / "log"

    @staticmethod
    def available() -> bool:
        return all(shutil.which(name, path=_PATH) for name in ("sshd", "ssh", "ssh-keygen"))

    @property
    def login(self) -> str:
        return f"{self.user}@127.0.0.1"

    @property
    def options(self) -> list[str]:
        return [f"IdentityFile={self.user_key}", f"UserKnownHostsFile={self.known_hosts}"]

    @property
    def arguments(self) -> list[str]:
        """The options as words for the `blockdiff backup` command line."""
        return [word for option in self.options for word in ("--ssh-option", option)]

    def url(self, path: str | Path, port: int | None = None) -> str:
        """Return a SOURCE; `port` is that of a relay, None for the sshd's own."""
        return f"ssh://{self.login}:{port or self.port}{path}"

    def trust(self, port: int, known_hosts: Path | None = None) -> None:
        """Add this sshd's key to `known_hosts` for another port of 127.0.0.1."""
        kind, key = self.host_key.with_suffix(".pub").read_text().split()[:2]
        with (known_hosts or self.known_hosts).open("a") as file:
            file.write(f"[127.0.0.1]:{port} {kind} {key}\n")

    def allow(self, line: str) -> None:
        """Add a line to the authorized keys."""
        with (self.directory / "authorized_keys").open("a", errors="surrogateescape") as file:
            file.write(line)

    def login_through(self, script: str) -> list[str]:
        """Return the options of a login whose shell is a script; it finds the command in SSH_ORIGINAL_COMMAND."""
        key = self.directory / f"key-{len(list(self.directory.iterdir()))}"
        shell = key.with_suffix(".sh")
        shell.write_text(script)
        shell.chmod(0o755)
        _make_key(key)
        self.allow(f'command="{shell}" {key.with_suffix(".pub").read_text()}')
        return [f"IdentityFile={key}", "IdentitiesOnly=yes", f"UserKnownHostsFile={self.known_hosts}"]

    def __enter__(self) -> "Sshd":
        for key in (self.host_key, self.user_key):
            _make_key(key)
        shutil.copy(self.user_key.with_suffix(".pub"), self.directory / "authorized_keys")
        (self.directory / "authorized_keys").chmod(0o600)
        self.port = _free_port()
        self.trust(self.port)
        config = self.directory / "sshd_config"
        config.write_text("\n".join(self._settings()) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        program = shutil.which("sshd", path=_PATH)
        assert program is not None
        with self._log.open("wb") as log:
            self._process = subprocess.Popen([program, "-D", "-e", "-f", config], stderr=log)
        self._wait_until_it_answers()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait(10)

    @property
    def pid(self) -> int:
        return self._process.pid

    def log(self) -> str:
        return self._log.read_text()

    def _settings(self) -> list[str]:
        return [
            f"Port {self.port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.host_key}",
            f"AuthorizedKeysFile {self.directory / 'authorized_keys'}",
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PasswordAuthentication no",
            "PermitRootLogin yes",
            *([] if any(line.startswith("MaxStartups") for line in self._extra) else ["MaxStartups 100"]),
            f"SetEnv {self.mark}",
            *self._extra,
            *(["PerSourcePenalties no"] if _punishes() else []),
        ]

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port), 1):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"sshd does not answer: {self.log()}") from None
                time.sleep(0.02)


def _make_key(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, timeout=60)


def _punishes() -> bool:
    """Return whether this sshd (9.8 or newer) can refuse an address after too many of its connections have failed."""
    program = shutil.which("sshd", path=_PATH)
    assert program is not None
    tried = subprocess.run([program, "-G", "-f", os.devnull, "-o", "PerSourcePenalties no"], capture_output=True)
    return tried.returncode == 0


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
