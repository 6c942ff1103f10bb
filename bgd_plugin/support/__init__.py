"""Helpers for every layer of the code: processes, atomic file writes, resumable steps, text tables."""
