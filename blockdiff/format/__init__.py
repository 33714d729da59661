"""The bytes of a generation's files (`docs/format.md`). Nothing here depends on chains."""
