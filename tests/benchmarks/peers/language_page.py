"""What the comparison on a language model leaves behind: rows as JSON, the plot, and its table in the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bgd_plugin.support.tables import mib
from tests.benchmarks.peers.page import FOLDER, between, figure, read

__all__ = ["FOLDER", "Row", "keep", "markdown", "plot", "read", "write_page"]

Row = dict[str, Any]
_MARKS = ("<!-- language: written by the command -->", "<!-- end of language -->")
_OURS = "bgd_plugin"


def keep(path: Path, row: Row) -> None:
    """Put a row in the place of the one of the same arm, at once: a run that is stopped loses nothing."""
    rows = [one for one in read(path) if one["arm"] != row["arm"]] + [row]
    path.write_text(json.dumps(sorted(rows, key=lambda one: one["bytes"]), indent=1) + "\n", encoding="utf-8")
    print(" | ".join(_cells(row)), flush=True)


def _cells(row: Row) -> list[str]:
    name = f"**{row['arm']}**" if row["arm"].startswith(_OURS) else row["arm"]
    figures = [f"{row['bits']:.2f}", mib(row["bytes"]), f"{row['bytes']:,}", f"{row['perplexity']:,.2f}"]
    return [name, *figures, f"{row['cpu_seconds']:.0f}"]


def markdown(rows: Sequence[Row]) -> str:
    """The table, in the order of the bytes."""
    lines = ["| arm | bits a weight, linear layers | file | bytes | perplexity | CPU-s |", "|---|---|---|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(_cells(row))} |" for row in rows])


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Put the table between the page's two marks."""
    page.write_text(between(page.read_text(encoding="utf-8"), _MARKS, markdown(rows)), encoding="utf-8")


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against bits of a weight: arms of one method are a curve."""
    compressed = [row for row in rows if row["arm"] != "float"]
    with figure(path, 1, 1, (8, 5)) as axes:
        axis = axes[0, 0]
        for method in dict.fromkeys(row["method"] for row in compressed):
            points = sorted((row["bits"], row["perplexity"]) for row in compressed if row["method"] == method)
            style = "*" if method.startswith(_OURS) else "o-"
            axis.plot(*zip(*points, strict=True), style, label=method, markersize=14 if style == "*" else 6)
        for row in rows:
            if row["arm"] == "float":
                axis.axhline(row["perplexity"], color="grey", linestyle=":", label="float")
        axis.set(yscale="log", ylabel="perplexity", xlabel="bits a weight of the linear layers, everything counted")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
