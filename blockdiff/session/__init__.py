"""Talk to an agent and believe little: the server's half of a conversation."""
