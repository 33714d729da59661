"""``python -m blockdiff`` is the `blockdiff` command."""

from blockdiff.start import blockdiff

blockdiff()
