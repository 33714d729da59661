"""What runs on the host: the agent and the modules that only it needs. Shipped to the host."""
