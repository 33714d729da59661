"""A private sshd on loopback: started by the tests that need one and stopped by its own pid."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path


class Sshd:
    """A running sshd with keys of its own, as a context manager.

    `options` make either transport find and trust it, `login` is ``user@127.0.0.1``, and `extra` are lines for its
    configuration. `url(path)` is a SOURCE on it.
    """

    def __init__(self, directory: Path, extra: Sequence[str] = ()) -> None:
        self.directory = directory
        self.user = getpass.getuser()
        self.host_key = directory / "host_key"
        self.user_key = directory / "user_key"
        self.known_hosts = directory / "known_hosts"
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

    def url(self, path: str | Path) -> str:
        return f"ssh://{self.login}:{self.port}{path}"

    def __enter__(self) -> "Sshd":
        for key in (self.host_key, self.user_key):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True, timeout=60)
        shutil.copy(self.user_key.with_suffix(".pub"), self.directory / "authorized_keys")
        (self.directory / "authorized_keys").chmod(0o600)
        self.port = _free_port()
        public = self.host_key.with_suffix(".pub").read_text().split()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {public[0]} {public[1]}\n")
        config = self.directory / "sshd_config"
        config.write_text("\n".join(self._settings()) + "\n")
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        program = shutil.which("sshd", path=_PATH)
        assert program is not None
        self._process = subprocess.Popen([program, "-D", "-e", "-f", config], stderr=self._log.open("wb"))
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
            "MaxStartups 100",
            *self._extra,
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


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
