"""The commands: the only place that prints, exits, and may import all other modules."""
