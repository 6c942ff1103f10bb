"""What the command leaves behind: rows as JSON, the plot, and the table in the page of the docs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bgd_plugin.support.tables import mib
from tests.benchmarks.peers.arms import ARMS, DEFAULT

__all__ = ["FOLDER", "between", "figure", "merge", "plot", "plot_one", "read", "write_page"]

FOLDER = Path(__file__).resolve().parents[3] / "docs" / "benchmarks"
_MARKS = ("<!-- table: written by the command -->", "<!-- end of the table -->")

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of earlier runs; none if there is no file."""
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return rows


def merge(rows: Sequence[Row], new: Row) -> list[Row]:
    """`rows` with `new` in the place of the row of the same network, images and arm."""

    def key(row: Row) -> tuple[str, ...]:
        return row["network"], row["images"], row["arm"]

    order = [*ARMS, "float"]
    kept = [row for row in rows if key(row) != key(new)] + [new]
    return sorted(kept, key=lambda r: (*key(r)[:2], order.index(r["arm"]) if r["arm"] in order else len(order)))


def _subjects(rows: Sequence[Row]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row["network"], row["images"]) for row in rows))


def markdown(rows: Sequence[Row]) -> str:
    """A table for each network, in the order of the bytes; below it, what did not finish."""
    parts = []
    for network, images in _subjects(rows):
        chosen = [row for row in rows if (row["network"], row["images"]) == (network, images)]
        done = sorted((row for row in chosen if "failed" not in row), key=lambda row: int(row["bytes"]))
        parts += [f"### {network}\n", f"{images}.\n"]
        parts += [
            "| arm | file | bytes | top-1 | agrees with float | KL to float | CPU-s |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in done:
            name = f"**{row['arm']}**" if row["arm"].startswith(DEFAULT) else row["arm"]
            figures = f"{row['top1']:.2f} | {row['agreement']:.2f} | {row['kl']:.4f} | {row['cpu_seconds']:.0f}"
            parts.append(f"| {name} | {mib(row['bytes'])} | {row['bytes']:,} | {figures} |")
        parts += [""] + [f"* {row['arm']}: {row['failed']}" for row in chosen if "failed" in row]
    return "\n".join(parts).strip()


def write_page(rows: Sequence[Row], page: Path) -> None:
    """Put the tables between the page's two marks."""
    page.write_text(between(page.read_text(encoding="utf-8"), _MARKS, markdown(rows)), encoding="utf-8")


def between(text: str, marks: tuple[str, str], new: str) -> str:
    """A page with what stands between two marks replaced."""
    before, rest = text.split(marks[0])
    after = rest.split(marks[1])[1]
    return f"{before}{marks[0]}\n\n{new}\n\n{marks[1]}{after}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Accuracy, and divergence from the float network, against bytes: a column for each network."""
    subjects = _subjects(rows)
    with figure(path, 2, len(subjects), (7 * len(subjects), 9.5)) as axes:
        for column, (network, images) in enumerate(subjects):
            _panels(rows, network, axes[0, column], axes[1, column])
            axes[0, column].set_title(f"{network}\n{images}", fontsize=10)


def plot_one(rows: Sequence[Row], network: str, path: Path) -> None:
    """The two panels of one network side by side, for the README."""
    with figure(path, 1, 2, (11, 4.2)) as axes:
        _panels(rows, network, axes[0, 0], axes[0, 1])
        axes[0, 0].set_title("Accuracy: higher is better", fontsize=11)
        axes[0, 1].set_title("Divergence from the float network: lower is better", fontsize=11)


@contextmanager
def figure(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """Axes `[rows, columns]` of a figure that is written to `path` at the end; `size` in inches."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _panels(rows: Sequence[Row], network: str, accuracy: Any, divergence: Any) -> None:
    chosen = [row for row in rows if row["network"] == network and "failed" not in row]
    _curves(accuracy, chosen, "top1")
    _curves(divergence, [row for row in chosen if row["kl"] > 0], "kl")
    for row in chosen:
        if row["arm"] == "float":
            accuracy.axhline(row["top1"], color="grey", linestyle=":", label=f"float, {row['bytes'] / 1e6:.1f} MB")
    accuracy.set_ylabel("top-1, %")
    accuracy.legend(fontsize=8, loc="lower right")
    divergence.set(yscale="log", ylabel="KL to float, nats")
    for axis in (accuracy, divergence):
        axis.set_xlabel("file, MB (everything counted)")
        axis.grid(alpha=0.3)


def _curves(axis: Any, rows: Sequence[Row], field: str) -> None:
    """A curve for each method; what is no point of its method's curve stands alone, in the same colour."""
    from matplotlib import pyplot

    methods = list(dict.fromkeys(arm.method for arm in ARMS.values()))
    colours = dict(zip(methods, pyplot.get_cmap("tab10").colors, strict=False))
    for method in methods:
        mine = [row for row in rows if row.get("method") == method]
        bold = {"linewidth": 2.6, "zorder": 3} if method == DEFAULT else {"linewidth": 1.2}
        for name, stands_alone, style in ((method, False, "o-"), (f"{method}, {_ALONE.get(method)}", True, "^")):
            points = sorted((r["bytes"] / 1e6, r[field]) for r in mine if _stands_alone(r) == stands_alone)
            if points:
                axis.plot(*zip(*points, strict=True), style, color=colours[method], label=name, markersize=6, **bold)


_ALONE = {DEFAULT: "default settings", "torchao codebook": "vectors", "coremltools": "vectors"}


def _stands_alone(row: Row) -> bool:
    setting = row["arm"].removeprefix(row["method"]).strip()
    return row["method"] in _ALONE and (setting == "default" or setting.startswith("d="))
