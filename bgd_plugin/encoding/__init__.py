"""Compact encodings: packed codes, entropy-coded streams, masks, 8-bit grids."""
