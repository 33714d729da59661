"""The files of chains in a directory: who may add to them, in what order they are written, and what they contain."""
