"""Mutants: the sources with one small defect each, and whether the fast tests notice it. See `make mutants`."""
