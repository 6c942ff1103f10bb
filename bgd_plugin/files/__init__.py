"""The file: how tensors are rounded and stored, `save`, `load`, and what a file holds."""
