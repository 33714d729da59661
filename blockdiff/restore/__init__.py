"""The targets of a restore, and the checks of what a target already contains."""
