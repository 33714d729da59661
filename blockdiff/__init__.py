"""blockdiff: block-level incremental backups of volumes, databases and VM images, pulled over SSH."""

__version__ = "0.1.0"
