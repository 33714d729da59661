"""The files of chains in a directory: who may add to them, in what order, and what they say."""
