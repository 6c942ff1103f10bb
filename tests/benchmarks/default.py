"""What a run with default settings gives on trained networks: bytes, divergence and the task's own measure.

Run `python -m tests.benchmarks.default` (`make bench-default`); names choose among the networks. Beside the default
stands a budget of the same bytes. `--bounds` gives the expected and measured divergence for other bounds instead.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch

import bgd_plugin as bgd
from bgd_plugin.config import DEFAULT_DIVERGENCE
from bgd_plugin.support.tables import table
from tests.benchmarks.default_networks import CASES, Case

__all__ = ["measured"]

_HEADER = ["network", "bound", "file", "expected", "measured", "float", "now", "budget", "passes", "choosing", "CPU s"]


def measured(case: Case, bound: float, *, with_budget: bool) -> dict[str, Any]:
    """One network under one bound.

    Args:
        case: the network and its data.
        bound: on the divergence.
        with_budget: also compress to the same bytes under a budget.
    """
    start = time.process_time()
    result = bgd.quantize(case.model, case.calibration, bgd.BGDConfig(max_divergence=bound), progress=False)
    seconds = time.process_time() - start
    report = result.report
    assert report.answers is not None
    row = {
        "network": case.name,
        "data": case.data,
        "bound": bound,
        "original_bytes": report.original_bytes,
        "bytes": report.compressed_bytes,
        "expected": report.expected_divergence,
        "measured": report.answers.divergence,
        "float": case.measure(case.model),
        "now": case.measure(result.model),
        "notes": [note for note in report.notes if note.startswith("bound")],
        "seconds": {name: round(value, 2) for name, value in report.seconds.items()},
        "cpu_seconds": round(seconds, 1),
        "peak_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "layers": {x.name: (x.block_size, x.codebook_size, round(x.relative_error, 4)) for x in report.layers},
    }
    if with_budget:
        config = bgd.BGDConfig(target_bytes=report.compressed_bytes)
        row["budget"] = case.measure(bgd.quantize(case.model, case.calibration, config, progress=False).model)
    return row


def _line(row: dict[str, Any]) -> list[str]:
    passes = row["notes"][-1].partition("after ")[2] or "1 pass" if row["notes"] else ""
    return [
        row["network"],
        f"{row['bound']:g}",
        f"{row['bytes']:,} ({row['original_bytes'] / row['bytes']:.1f}×)",
        f"{row['expected'] or 0:.3g}",
        f"{row['measured']:.3g}",
        f"{row['float']:.1f}",
        f"{row['now']:.1f}",
        f"{row['budget']:.1f}" if "budget" in row else "",
        passes,
        f"{row['seconds'].get('budget', 0):.1f}",
        f"{row['cpu_seconds']:.1f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CASES)}; all unless given")
    parser.add_argument("--bounds", type=float, nargs="+", default=[DEFAULT_DIVERGENCE])
    parser.add_argument("--no-budget", action="store_true", help="leave the budget of the same bytes out")
    parser.add_argument("--photos", type=Path, help="folder of labelled images: NAME_CLASS.jpg; else the demo's 20")
    parser.add_argument("--split", type=int, default=0, help="seed of the photos' two halves")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to which each row is added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.networks or CASES:
        for case in CASES[name](options):
            for bound in options.bounds:
                row = measured(case, bound, with_budget=not options.no_budget)
                rows.append(row)
                print(" | ".join(_line(row)), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(_HEADER, [_line(row) for row in rows]))


if __name__ == "__main__":
    main()
