"""Accuracy against bytes: this library beside what a user would pick instead. `python -m tests.benchmarks.peers`."""
