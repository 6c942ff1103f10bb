"""Plain-text tables, and human-readable sizes."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["mib", "percent", "table"]


def mib(size_bytes: float) -> str:
    """Format a size in MiB, or in KiB if it is small.

    Args:
        size_bytes: the size in bytes.

    Returns:
        text such as "1.485 MiB".
    """
    return f"{size_bytes / 2**20:.3f} MiB" if size_bytes >= 2**20 / 10 else f"{size_bytes / 2**10:.2f} KiB"


def percent(share: float) -> str:
    """Format a share in percent, with two decimals, or with two significant digits if it is small.

    Args:
        share: such as 0.25.

    Returns:
        text such as "25.00%" or "0.0031%".
    """
    value = 100 * share
    return f"{value:.2f}%" if value == 0 or abs(value) >= 0.1 else f"{value:.2g}%"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A text table of a header and rows: numbers are right-aligned, words left-aligned, empty columns omitted."""
    cells = [list(header)] + [[str(cell) for cell in row] for row in rows]
    keep = [i for i in range(len(header)) if not rows or any(row[i] for row in cells[1:])]
    cells = [[row[i] for i in keep] for row in cells]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keep))]
    right = [bool(rows) and all(_is_number(row[i]) for row in cells[1:]) for i in range(len(keep))]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("─" * w for w in widths), *lines[1:]])


def _is_number(text: str) -> bool:
    return text[:1].isdigit() or text[:1] in "+-" or text == ""
