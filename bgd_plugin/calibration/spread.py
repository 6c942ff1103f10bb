"""Some of the batches, spread over all of them: no work on samples beyond what a statistic can use."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["enough_batches"]

_SAMPLES = 64
_BATCHES = 16
"""At the least: data may be sorted, by class for instance."""


def enough_batches(count: int, samples: int, positions: int, needed: int) -> Sequence[int]:
    """The numbers of as many batches as hold the positions needed, in 64 samples at the least; all, where few do.

    Args:
        count: of all batches.
        samples: in a batch.
        positions: in a sample.
        needed: positions of all samples together.
    """
    wanted = max(_SAMPLES, -(-needed // max(1, positions)))
    step = min(count * samples // wanted, count // _BATCHES)
    return range(0, count, max(1, step))
