"""The steps of a layer's fit: compiled sweeps against plain ones, and what k-means gains by long and by many steps.

Run `python -m tests.benchmarks.sweeps` (`make bench-sweeps`). Weights are normal, and inputs correlated, drawn from one
seed. Times are CPU-time of one thread, the least of three, both ways in turn. Errors are those of the layer's outputs
on other inputs, relative to the outputs: of a fit whose k-means makes plain steps, and no more of them on single
weights than on others, and of the fit as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from unittest import mock

import torch
from torch import Tensor

from bgd_plugin.jit.sweep import can_sweep
from bgd_plugin.pq import feedback, least_squares, positions
from bgd_plugin.pq.feedback import encode_with_feedback
from bgd_plugin.pq.full_gram import fit_full
from bgd_plugin.pq.least_squares import output_objective, refine_codes
from bgd_plugin.support.tables import table

LAYERS = (
    # rows, columns, block size, codewords
    (576, 576, 4, 256),
    (576, 1536, 4, 256),
    (576, 1536, 2, 256),
    (576, 1536, 1, 64),
    (512, 2304, 9, 256),
)
_DAMPING = 0.2
_REPEATS = 3


def drawn(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A weight `[rows, columns]`, and the Grams `[columns, columns]` of its inputs and of others."""
    draw = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    weight = torch.randn(rows, columns, generator=draw)
    inputs = (torch.randn(8 * columns, columns, generator=draw) @ mixing for _ in range(2))
    fitted, heldout = (x.mT @ x / len(x) for x in inputs)
    return weight, fitted, heldout


def times(weight: Tensor, gram: Tensor, block_size: int, codewords: int) -> list[float]:
    """CPU-seconds of error feedback and of coordinate descent, plain and compiled: four numbers."""
    codebook = torch.randn(codewords, block_size, generator=torch.Generator().manual_seed(1))
    found: list[list[float]] = [[], [], [], []]
    for _ in range(_REPEATS):
        for place, refused in enumerate((True, False)):
            can = (lambda *_: False) if refused else can_sweep
            with mock.patch.object(feedback, "can_sweep", can), mock.patch.object(least_squares, "can_sweep", can):
                start = time.process_time()
                codes = encode_with_feedback(weight, codebook, gram, damping=_DAMPING)
                between = time.process_time()
                refine_codes(weight, codebook, codes, gram)
                found[place].append(between - start)
                found[2 + place].append(time.process_time() - between)
    return [min(one) for one in found]


def errors(weight: Tensor, gram: Tensor, heldout: Tensor, block_size: int, codewords: int) -> list[float]:
    """Relative errors on other inputs, with plain steps as with others' number of them, and as it is: two numbers."""
    found = []
    for relaxation, on_a_line in ((1.0, 1), (positions._RELAXATION, positions._ON_A_LINE)):
        with (
            mock.patch.object(positions, "_RELAXATION", relaxation),
            mock.patch.object(positions, "_ON_A_LINE", on_a_line),
        ):
            draw = torch.Generator().manual_seed(2)
            fit = fit_full(weight, gram, heldout, codewords, block_size, damping=_DAMPING, generator=draw)
        zero = torch.zeros_like(fit.codebook[:1]), torch.zeros_like(fit.codes)
        found.append(
            output_objective(weight, fit.codebook, fit.codes, heldout) / output_objective(weight, *zero, heldout)
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.sweeps", description=main.__doc__)
    parser.add_argument("--layers", type=int, nargs="*", default=range(len(LAYERS)), help="which, counted from 0")
    torch.set_num_threads(1)
    rows = []
    for number in parser.parse_args(arguments).layers:
        height, columns, block_size, codewords = LAYERS[number]
        weight, gram, heldout = drawn(height, columns)
        spent = times(weight, gram, block_size, codewords)
        plain, now = errors(weight, gram, heldout, block_size, codewords)
        steps = [f"{1000 * before:.0f} → {1000 * after:.0f} ms" for before, after in (spent[:2], spent[2:])]
        layer = f"{height}×{columns}"
        rows.append(
            [layer, str(block_size), str(codewords), *steps, f"{plain:.5f} → {now:.5f}", f"{now / plain - 1:+.1%}"]
        )
    print(table(["layer", "d", "k", "error feedback", "coordinate descent", "error", "by"], rows))


if __name__ == "__main__":
    main()
