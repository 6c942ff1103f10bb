"""The file: rounding, storage format, `save`, `load`, and inspection."""
