"""``python -m blockdiff`` is the `blockdiff` command."""

from blockdiff.cli.modern import main

main()
