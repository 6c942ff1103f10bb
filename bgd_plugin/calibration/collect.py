"""Collect the calibration data: all batches, in pieces that the network runs fast on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.agreement import FAILURES, first_difference, same_random_numbers
from bgd_plugin.calibration.batches import Batch, Batches, Forward, iterate_batches
from bgd_plugin.calibration.cutting import can_be_cut, pieces_of, some_samples_of
from bgd_plugin.calibration.store import BatchStore
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module, set_modes

__all__ = ["collect_batches"]

_PAIR = 2


def collect_batches(
    calibration: Iterable[Any],
    model: nn.Module,
    *,
    device: torch.device,
    forward: Forward | None,
    memory_bytes: int | None = None,
) -> Batches:
    """All batches of the calibration data, on `device`.

    A large batch is cut into pieces of a few samples, if the network answers each sample by itself.

    Args:
        calibration: as in `iterate_batches`.
        model: as in `iterate_batches`.
        device: where the batches go.
        forward: as in `iterate_batches`.
        memory_bytes: limit of what is held in memory; None: no limit.

    Raises:
        CalibrationError: there is no batch, or a batch has an unsupported form.
    """
    is_divisible = _Divisible(model)
    batches = Batches(BatchStore(memory_bytes), is_divisible)
    for batch in iterate_batches(calibration, model, device=device, forward=forward):
        batches.append(pieces_of(batch, is_divisible))
    if not batches:
        raise CalibrationError(
            "the calibration data is empty: give an iterable of batches, such as a DataLoader "
            "(an iterator that is already used up is empty too)"
        )
    return batches


class _Divisible:
    """Whether a network answers each sample of a batch by itself: tried on the first batch that is asked about.

    Not so where it has a fixed batch size, as many an exported one has, or looks at all samples at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: bool | None = None

    def __call__(self, batch: Batch) -> bool:
        if self._found is None and batch.size >= _PAIR and can_be_cut(batch):
            self._found = _answers_alone(self._model, batch)
        return self._found is not False


@torch.no_grad()
def _answers_alone(model: nn.Module, batch: Batch) -> bool:
    """Whether a network gives a sample the same answer alone as beside another, tried on copies in evaluation mode."""
    answers = []
    for places in (range(_PAIR), range(1)):
        network = copy_module(model, share_tensors=True)
        set_modes(network, {"": False})
        try:
            with same_random_numbers():
                answers.append(some_samples_of(batch, places).call(network))
        except FAILURES:
            return False
    both, alone = answers
    first = pytree.tree_map_only(torch.Tensor, lambda t: t[:1] if t.ndim and len(t) == _PAIR else t, both)
    return not first_difference(alone, first, "")
