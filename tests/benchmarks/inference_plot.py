"""Draw the figures of `tests.benchmarks.inference`: `python -m tests.benchmarks.inference_plot FIGURES PICTURE`."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def draw(figures: Path, picture: Path) -> None:
    """A bar for each subject and arm: its speed relative to float, with the quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in json.loads(figures.read_text()) if row["arm"] != "float"]
    subjects, arms = list(dict.fromkeys(r["subject"] for r in rows)), list(dict.fromkeys(r["arm"] for r in rows))
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.45 * len(subjects)))
    height = 0.8 / len(arms)
    for i, arm in enumerate(arms):
        own = [r for r in rows if r["arm"] == arm]
        places = [subjects.index(r["subject"]) + i * height for r in own]
        spread = [[max(0, r["ratio"] - r["low"]) for r in own], [max(0, r["high"] - r["ratio"]) for r in own]]
        axes.barh(places, [r["ratio"] for r in own], height, xerr=spread, label=arm)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([n + 0.4 - height / 2 for n in range(len(subjects))], subjects)
    axes.invert_yaxis()
    axes.set_xlabel("speed relative to float")
    axes.legend()
    figure.tight_layout()
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
