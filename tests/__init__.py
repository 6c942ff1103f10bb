"""The tests mirror the package; `tests.benchmarks` holds scripts that are run by hand."""
