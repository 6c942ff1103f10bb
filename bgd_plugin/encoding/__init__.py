"""Numbers in few bits: packed codes, masks, 8-bit grids."""
