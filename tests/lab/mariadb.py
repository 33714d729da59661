"""MariaDB in the guest: a server on a directory of its own, reached through a forwarded port."""

import shlex
from types import TracebackType

import pymysql

from tests.lab.guest import Guest
from tests.lab.image import MARIADB_TEMPLATE
from tests.mariadb import Server

SOCKET = "/run/mysqld/mysqld.sock"
_START_TIMEOUT_S = 120
_SUPERUSER = "tester"
_OPTIONS = (
    "--no-defaults --user=mysql --bind-address=0.0.0.0 --skip-name-resolve --innodb-log-file-size=16M"
    # User Mode Linux has less address space than the server would reserve, and io_uring stands still there
    " --loose-innodb-buffer-pool-size-max=64M --innodb-use-native-aio=0"
    " --innodb-buffer-pool-size=16M --key-buffer-size=1M --aria-pagecache-buffer-size=8M"
)


class GuestMariaDB(Server):
    """Starts with the `with` statement, and stops at its end. The guest's root is its superuser, and so are we.

    `data` is a directory of the guest; where it does not exist it is made as `mariadb-install-db` makes it. `options`
    are more words of the server's command line. `socket` is its socket in the guest, `unit` its name for systemctl, and
    `port` that of 127.0.0.1 on this machine which leads to `guest_port`. Two servers need different ports and sockets.
    """

    def __init__(self, guest: Guest, data: str, *options: str, guest_port: int = 3306, socket: str = SOCKET) -> None:
        self.guest = guest
        self.data = data
        self.socket = socket
        self.port = guest.forward(guest_port)
        self._guest_port = guest_port
        self.unit = f"lab-mariadb-{guest_port}"
        self._log = f"/run/{self.unit}.log"
        self._options = options

    def __enter__(self) -> "GuestMariaDB":
        data = shlex.quote(self.data)
        fresh = self.guest.run(f"test -d {data}", check=False).returncode != 0
        if fresh:
            self.guest.run(f"cp -a {MARIADB_TEMPLATE} {data}")
        self.start()
        if fresh:
            self.client(
                f"CREATE USER {_SUPERUSER}@'%' IDENTIFIED BY '{_SUPERUSER}';"
                f" GRANT ALL ON *.* TO {_SUPERUSER}@'%' WITH GRANT OPTION"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the server; returns when it is ready."""
        words = f"--datadir={shlex.quote(self.data)} --socket={self.socket} --port={self._guest_port}"
        words += f" --pid-file=/run/mysqld/{self.unit}.pid --log-error={self._log} {shlex.join(self._options)}"
        unit = f"--unit={self.unit} --property=TimeoutStartSec={_START_TIMEOUT_S} --service-type=notify"
        started = self.guest.run(
            f"rm -f {self._log}; systemd-run --quiet --collect {unit} -- mariadbd {_OPTIONS} {words}",
            timeout_s=_START_TIMEOUT_S + 30,
            check=False,
        )
        assert started.returncode == 0, started.stderr + self.log()

    def stop(self) -> None:
        """Stop the server, if it runs; returns when it has ended."""
        self.guest.run(f"systemctl stop {self.unit}", timeout_s=120, check=False)

    def log(self) -> str:
        """Return what the server has written to its log since it was started."""
        return self.guest.run(f"cat {self._log}", check=False).stdout

    def client(self, statements: str) -> str:
        """Execute statements by the guest's own client as its root; return what they print, without headings."""
        return self.guest.run(f"mariadb --no-defaults --socket={self.socket} -N", stdin=statements).stdout

    def connect(
        self, user: str | None = None, password: str = _SUPERUSER
    ) -> "pymysql.Connection[pymysql.cursors.DictCursor]":
        """Return a new session, over TCP; by default the superuser's. The caller closes it."""
        return pymysql.Connection(
            host="127.0.0.1",
            port=self.port,
            user=user or _SUPERUSER,
            password=password.encode(),
            autocommit=True,
            connect_timeout=30,
            read_timeout=120,
            write_timeout=120,
            cursorclass=pymysql.cursors.DictCursor,
        )
