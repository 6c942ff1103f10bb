"""What every floor may use: processes, files that are whole or absent, resumable steps, text tables."""
