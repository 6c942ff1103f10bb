"""Out of Python: a compressed network as one small file of another runtime, checked there before the call returns."""
