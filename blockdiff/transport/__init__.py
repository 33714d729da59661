"""Push the agent to where the source is: over the system's ssh, over paramiko, or into a child of our own."""

import shutil
from collections.abc import Sequence

from blockdiff.shared.errors import TransportError
from blockdiff.transport import child, openssh
from blockdiff.transport.address import Address
from blockdiff.transport.connection import Connection, send_agent

NAMES = ("ssh", "paramiko")


def connect(address: Address, name: str | None = None, options: Sequence[str] = ()) -> Connection:
    """Return a connection to a command on `address` that is about to become the agent.

    `name` is one of `NAMES`; None takes the system's ssh if there is one. `options` are like ``Port=2222``. Raises
    `TransportError` if the connection cannot be made (with ssh, that shows when the agent is pushed).
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
    from blockdiff.transport import paramiko_ssh  # here, because its import takes longer than a small backup

    return paramiko_ssh.ParamikoConnection(address, options)


def begin(
    address: Address, name: str | None = None, options: Sequence[str] = (), prefix: Sequence[str] = ()
) -> Connection:
    """Return a connection as `connect` does, on which the agent is on its way: the host works on it from now on.

    `prefix` is a command to run the agent under. Raises `TransportError` if that cannot be sent.
    """
    connection = connect(address, name, options)
    try:
        send_agent(connection, prefix)
    except BaseException:
        connection.close()
        raise
    return connection
