"""Start the agent where the source is: over the system's ssh, over paramiko, or in a child process on this machine."""

import shutil
from collections.abc import Sequence

from blockdiff.shared.errors import TransportError
from blockdiff.transport import child, openssh
from blockdiff.transport.address import Address
from blockdiff.transport.connection import Connection, send_agent

NAMES = ("ssh", "paramiko")


def connect(address: Address, name: str | None = None, options: Sequence[str] = ()) -> Connection:
    """Return a connection to a command on `address` that will become the agent.

    `name` is one of `NAMES`; None means the system's ssh if it is installed. `options` are like ``Port=2222``. Raises
    `TransportError` if the connection cannot be made (with ssh, that is known only when the agent is pushed).
    """
    if address.host is None:
        return child.local()
    installed = shutil.which("ssh") is not None
    if name == "ssh" and not installed:
        raise TransportError(
            "there is no ssh program on this machine", "install openssh-client, or --transport paramiko"
        )
    if name == "ssh" or (name is None and installed):
        return openssh.SshConnection(address, options)
    from blockdiff.transport import paramiko_ssh  # imported here, because that takes longer than a small backup

    return paramiko_ssh.ParamikoConnection(address, options)


def begin(
    address: Address, name: str | None = None, options: Sequence[str] = (), prefix: Sequence[str] = ()
) -> Connection:
    """Return a connection like `connect`, over which the agent was sent already: the host starts it while we continue.

    `prefix` is a command that runs the agent. Raises `TransportError` if the agent cannot be sent.
    """
    connection = connect(address, name, options)
    try:
        send_agent(connection, prefix)
    except BaseException:
        connection.close()
        raise
    return connection
