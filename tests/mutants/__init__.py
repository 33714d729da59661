"""Mutation testing of the modules that everything rests on: `make mutants`."""
