"""The system's ssh: it brings the user's ``~/.ssh/config``, jump hosts, agents and hardware keys."""

from collections.abc import Sequence

from blockdiff import bundle
from blockdiff.address import Address
from blockdiff.errors import BlockdiffError, ConnectionLost
from blockdiff.transport import advice
from blockdiff.transport.child import ChildConnection

#: Settings that hold whatever ``~/.ssh/config`` says, unless the user gave the same with --ssh-option. The cipher
#: is the fastest by far where the CPU has AES, and only moved to the front of the list.
_SETTINGS = (
    "BatchMode=yes",
    "StrictHostKeyChecking=yes",
    "Ciphers=^aes128-gcm@openssh.com",
    "ConnectTimeout=30",
    "ServerAliveInterval=15",
    "ServerAliveCountMax=4",
    "ClearAllForwardings=yes",
    "ForwardAgent=no",
    "ForwardX11=no",
    "PermitLocalCommand=no",
    "ControlMaster=no",
    "RequestTTY=no",
    "EscapeChar=none",
    "LogLevel=ERROR",
)

# the exit status of ssh itself
_SSH_FAILED = 255


class SshConnection(ChildConnection):
    """A command on a host, through a child process that is ssh."""

    def __init__(self, address: Address, options: Sequence[str]) -> None:
        self._address = address
        super().__init__(arguments(address, options), address.login)

    def wait(self, timeout_s: float) -> int | None:
        """See `connection.Connection`."""
        status = super().wait(timeout_s)
        return -1 if status == _SSH_FAILED else status

    def explain(self, error: ConnectionLost) -> BlockdiffError:
        """Return what ssh said of its failure, where it failed itself."""
        if self.wait(0) == -1 and (known := advice.from_ssh(self._address, self.stderr())) is not None:
            return known
        return super().explain(error)


def arguments(address: Address, options: Sequence[str]) -> list[str]:
    """Return ssh's argument list: nothing of it is ever read by a shell on this side.

    `options` are the user's, each like ``Port=2222``; ssh takes the first value that it meets, so they come first.
    """
    words = ["ssh"]
    for option in (*options, *_SETTINGS):
        words += ("-o", option)
    if address.port is not None:
        words += ("-p", str(address.port))
    if address.user is not None:
        words += ("-l", address.user)
    return [*words, "-T", "--", address.host or "", bundle.remote_command()]
