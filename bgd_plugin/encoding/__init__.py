"""Compact encodings: packed codes, masks, 8-bit grids."""
