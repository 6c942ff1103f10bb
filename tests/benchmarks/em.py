"""The fast EM against a literal one, and its cost on a large layer.

Run with `python -m tests.benchmarks.em` (`make bench-em`). Parts:

1. Three small layers, correlated rectified inputs, float64: objective and codes against `tests.oracles.literal_em`.
2. A 512×512×3×3 layer, k=256, d=9, 100 iterations, float32: CPU-seconds, and the extra peak memory of a fresh process.
3. One iteration of 2 against the literal one. Literal steps for the whole layer would take hours, so the E-step is run
   on some of the blocks and the M-step on some of the clusters, and the time is scaled up linearly; the activations are
   those of 2 images at 28×28.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from bgd_plugin.pq import kmeans
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.em import fit_em
from tests.oracles import (
    SHAPES,
    correlated_layer,
    literal_distances,
    literal_em,
    literal_least_squares,
    reconstruction_objective,
)

LARGE = (512, 512, 3, 9)
CODEWORDS, ITERATIONS = 256, 100
TARGETS = {"relative_difference": 1e-6, "cpu_seconds": 20.0, "extra_peak": 4.0, "speedup": 1000.0}

Row = dict[str, str | float | bool]


def generator(seed: int = 0) -> torch.Generator:
    """A generator of its own for each use, so that both sides of a comparison draw the same."""
    return torch.Generator().manual_seed(seed)


def against_the_literal() -> list[Row]:
    """Part 1: same start, same data, float64."""
    rows: list[Row] = []
    for name, shape in SHAPES.items():
        blocks, activations = correlated_layer(shape, images=2, size=8)
        literal = literal_em(blocks, activations, 32, 25, generator=generator(3))
        gram = activations.T @ activations
        fast = fit_em(blocks, gram, 32, 25, generator=generator(3))
        objective, expected = (reconstruction_objective(blocks, x.codebook, x.codes, gram) for x in (fast, literal))
        difference = abs(objective - expected) / expected
        rows.append(
            {
                "shape": name,
                "blocks": fast.codes.numel(),
                "activations": len(activations),
                "literal_objective": expected,
                "objective": objective,
                "relative_difference": difference,
                "same_codes": torch.equal(fast.codes, literal.codes),
                "holds": torch.equal(fast.codes, literal.codes) and difference <= TARGETS["relative_difference"],
            }
        )
    return rows


def _large_fit(threads: int) -> dict[str, float]:
    """Run part 2 in a process of its own, whose peak memory nothing else has touched."""
    torch.set_num_threads(threads)
    blocks, gram = correlated_blocks_and_gram()
    fit_em(blocks[:8], gram, CODEWORDS, 2, generator=generator())  # loads and warms the libraries
    counted = _count_iterations()
    _reset_peak()
    before, start, wall = _memory_bytes("VmRSS"), time.process_time(), time.perf_counter()
    fit = fit_em(blocks, gram, CODEWORDS, ITERATIONS, generator=generator())
    measured = {
        "iterations": float(next(counted)),
        "cpu_seconds": time.process_time() - start,
        "seconds": time.perf_counter() - wall,
        "extra_peak": (_memory_bytes("VmHWM") - before) / (blocks.numel() * blocks.element_size()),
    }
    return measured | {"objective": reconstruction_objective(blocks, fit.codebook, fit.codes, gram)}


def _count_iterations() -> Iterator[int]:
    """Count the iterations of k-means from now on; it may end before the last one that it is allowed."""
    assign, counts = kmeans._assign, itertools.count()

    def counted(*arguments: Tensor) -> Tensor:
        next(counts)
        return assign(*arguments)

    kmeans._assign = counted
    return counts


def correlated_blocks_and_gram() -> tuple[Tensor, Tensor]:
    """The large layer in float32, and the Gram of a few inputs; little memory, so that the peak is the fit's."""
    c_out, c_in, kernel, block_size = LARGE
    weight = torch.empty(c_out, c_in, kernel, kernel).normal_(generator=generator(7))
    _, activations = correlated_layer((1, 16, kernel, block_size), images=1, size=14, dtype=torch.float32)
    return to_blocks(weight, block_size), activations.T @ activations


def _memory_bytes(field: str) -> int:
    """`VmRSS`, what is resident now, or `VmHWM`, its peak since `_reset_peak`.

    Elsewhere than on Linux both are the peak since the process began, so that what the fit takes may come out too low.
    (Linux has that peak too, but hands it on from the parent process.)
    """
    if sys.platform == "linux":
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def large_layer(threads: int) -> Row:
    """Part 2, in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        measured = pool.apply(_large_fit, (threads,))
    holds = measured["cpu_seconds"] <= TARGETS["cpu_seconds"] and measured["extra_peak"] <= TARGETS["extra_peak"]
    return {"layer": "512x512x3x3 k=256 d=9", "threads": threads, **measured, "holds": holds}


def literal_iteration(fast_seconds: float) -> Row:
    """Part 3: CPU-seconds of one literal iteration on the large layer, scaled up, over the fast one's."""
    blocks, activations = correlated_layer(LARGE, images=2, size=28)
    flat, some, tried = blocks.flatten(0, 1), 16, 2
    start = time.process_time()
    for codeword in flat[:tried]:
        literal_distances(activations, flat[:some], codeword)
    distances = (time.process_time() - start) * (CODEWORDS / tried) * (len(flat) / some)
    start = time.process_time()
    literal_least_squares(activations, flat[:some])
    squares = (time.process_time() - start) * CODEWORDS
    ratio = (distances + squares) / fast_seconds
    return {
        "activations": len(activations),
        "e_step_cpu_seconds_extrapolated": distances,
        "m_step_cpu_seconds_extrapolated": squares,
        "fast_cpu_seconds": fast_seconds,
        "speedup": ratio,
        "holds": ratio >= TARGETS["speedup"],
    }


def table(rows: list[Row]) -> str:
    """Plain columns, one line per row."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def _cell(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(
    threads: Annotated[int, typer.Option(help="Threads that torch may use.")] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Measure, print, and end with status 1 where a target is missed."""
    torch.set_num_threads(threads)
    compared = against_the_literal()
    print(
        "EM against the literal reference, float64, same start (k=32, at most 25 iterations)", table(compared), sep="\n"
    )
    large = large_layer(threads)
    print("\nA large layer, float32; extra_peak in multiples of the weight's bytes", table([large]), sep="\n")
    literal = literal_iteration(float(large["cpu_seconds"]) / float(large["iterations"]))
    print(
        "\nOne iteration of it. The literal steps are extrapolated, not run: 2 of 256 codewords on 16 of 262144 blocks",
        "and 1 of 256 least squares, on 16 members, times their number; activations are those of 2 images at 28x28.",
        table([literal]),
        sep="\n",
    )
    if json_path:
        figures = {"literal": compared, "large": large, "iteration": literal, "targets": TARGETS}
        json_path.write_text(json.dumps(figures, indent=2) + "\n")
    if not all(row["holds"] for row in [*compared, large, literal]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
