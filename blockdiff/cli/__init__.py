"""The commands: the only place that prints, exits, and knows everybody."""
