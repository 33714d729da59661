"""What runs on the host: the agent, and all that it does there. Shipped to it."""
