"""What a run with default settings gives on trained networks: bytes, divergence and the task's own measure.

Run `python -m tests.benchmarks.default` (`make bench-default`); names choose among the networks. Beside the default
stands a budget of the same bytes. `--bounds` takes other bounds, `--five` five of them, `--ratios` budgets in their
place; the last line counts the files whose measured divergence is within a factor of 1.5 of the expected one. All
seconds are CPU-seconds: those of choosing sizes, those of all steps of the last pass's fit, and those of the whole run.
"""

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import bgd_plugin as bgd
from bgd_plugin.config import DEFAULT_DIVERGENCE
from bgd_plugin.support.tables import table
from tests.benchmarks.default_networks import CASES, Case

__all__ = ["measured"]

_HEADER = [
    "network",
    "bound",
    "file",
    "expected",
    "measured",
    "factor",
    "float",
    "now",
    "budget",
    "passes",
    "choosing",
    "fitting",
    "CPU s",
]
_NEAR = 1.5
_FIVE = 0.001, 0.003, 0.01, 0.03, 0.1


def measured(case: Case, config: bgd.BGDConfig, *, with_budget: bool) -> dict[str, Any]:
    """One network under one bound.

    Args:
        case: the network and its data.
        config: the settings, with a bound on the divergence or a ratio.
        with_budget: also compress to the same bytes under a budget.
    """
    start = time.process_time()
    with mock.patch.object(time, "perf_counter", time.process_time):  # of the report's steps, too
        result = bgd.quantize(case.model, case.calibration, config, progress=False)
    seconds = time.process_time() - start
    report = result.report
    assert report.answers is not None
    row = {
        "network": case.name,
        "data": case.data,
        "bound": config.target_ratio or config.max_divergence,
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
        same = bgd.BGDConfig(target_bytes=report.compressed_bytes)
        row["budget"] = case.measure(bgd.quantize(case.model, case.calibration, same, progress=False).model)
    return row


def _line(row: dict[str, Any]) -> list[str]:
    passes = row["notes"][-1].partition("after ")[2] or "1 pass" if row["notes"] else ""
    return [
        row["network"],
        f"{row['bound']:g}",
        f"{row['bytes']:,} ({row['original_bytes'] / row['bytes']:.1f}×)",
        f"{row['expected'] or 0:.3g}",
        f"{row['measured']:.3g}",
        f"{row['measured'] / row['expected']:.2f}" if row["expected"] else "",
        f"{row['float']:.1f}",
        f"{row['now']:.1f}",
        f"{row['budget']:.1f}" if "budget" in row else "",
        passes,
        f"{row['seconds'].get('budget', 0):.1f}",
        f"{sum(seconds for name, seconds in row['seconds'].items() if name != 'budget'):.1f}",
        f"{row['cpu_seconds']:.1f}",
    ]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(CASES)}; all unless given")
    parser.add_argument("--bounds", type=float, nargs="+", default=[DEFAULT_DIVERGENCE])
    parser.add_argument("--five", action="store_true", help=f"five bounds: {_FIVE}; expected against measured alone")
    parser.add_argument("--ratios", type=float, nargs="+", default=[], help="budgets, in place of bounds")
    parser.add_argument("--no-budget", action="store_true", help="leave the budget of the same bytes out")
    parser.add_argument("--photos", type=Path, help="folder of labelled images: NAME_CLASS.jpg; else the demo's 20")
    parser.add_argument("--split", type=int, default=0, help="seed of the photos' two halves")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--json", type=Path, help="file to which each row is added")
    options = parser.parse_args()
    torch.set_num_threads(1)
    configs = [bgd.BGDConfig(target_ratio=ratio) for ratio in options.ratios]
    bounds = _FIVE if options.five else options.bounds
    configs = configs or [bgd.BGDConfig(max_divergence=bound) for bound in bounds]
    rows = []
    for name in options.networks or CASES:
        for case in CASES[name](options):
            for config in configs:
                row = measured(case, config, with_budget=not (options.no_budget or options.five))
                rows.append(row)
                print(" | ".join(_line(row)), flush=True)
                if options.json:
                    with options.json.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(_HEADER, [_line(row) for row in rows]))
    near = sum(_is_near(row["expected"], row["measured"]) for row in rows)
    print(f"measured within a factor of {_NEAR} of expected: {near} of {len(rows)}")


def _is_near(expected: float | None, found: float) -> bool:
    return bool(expected) and 1 / _NEAR <= found / (expected or 1.0) <= _NEAR


if __name__ == "__main__":
    main()
