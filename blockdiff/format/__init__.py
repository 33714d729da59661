"""The bytes of a generation's files (`docs/format.md`): nothing here knows of chains."""
