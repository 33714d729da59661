"""The server's side of a session with an agent. Nothing that the agent sends is trusted without a check."""
