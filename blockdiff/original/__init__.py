"""What exists only for the tool of 2010: its descriptors, its commands, its log."""
