"""Prove that a chain restores, compare it with its source, and repair it."""
