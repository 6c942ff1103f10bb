"""Block-wise reconstruction of a network that is no graph: its blocks are modules of a few layers each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, Rerun
from bgd_plugin.config import ReconstructionConfig
from bgd_plugin.graph import module_at
from bgd_plugin.support.steps import Steps
from bgd_plugin.training.reconstruction import BlockTraining, Reconstruction, chunks_of

__all__ = ["reconstruct_modules_"]

_MOST_LAYERS = 12
_CONSTANTS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)


def reconstruct_modules_(
    student: nn.Module,
    reference: nn.Module,
    batches: Sequence[Batch],
    weights: Mapping[str, Tensor],
    config: ReconstructionConfig,
    generator: Callable[[str], torch.Generator],
    steps: Callable[[int], Steps],
    on_blocks: Callable[[int], object],
) -> Reconstruction:
    """Train every module of a few quantized layers, in the order in which they run; as `reconstruct_`.

    A block's target is its first floating-point output in the float network. Modules that run several times in a batch,
    and layers that code outside of modules computes, are left as they are.

    Args:
        student: with product-quantized modules, in evaluation mode.
        reference: the same network, float.
        batches: calibration data.
        weights: the float weights of the quantized layers, by name, each of its layer's own shape.
        config: the settings.
        generator: random numbers for a block, by name.
        steps: for the number of a block, what keeps the progress of its training, and tells it.
        on_blocks: called once with the number of blocks.

    Raises:
        CalibrationError: the loss is not finite.
    """
    walk = Rerun(student, reference, batches, weights, [])
    losses: list[tuple[float, float]] = []
    blocks = walk.blocks(weights, _MOST_LAYERS)
    on_blocks(len(blocks))
    for number, path in enumerate(blocks):
        chunks = []
        for given, answer in walk.block_runs(path):
            target = _first(answer)
            if target is not None:
                chunks += chunks_of(Batch(*given), target, config.batch_size)
        if chunks:
            training = BlockTraining(student, _Block(module_at(student, path)), chunks, is_last=False)
            losses.append(training.run_(config, generator(path), steps(number)))
    return Reconstruction.of(losses)


class _Block(nn.Module):
    """A module whose only output is its first floating-point tensor, and which leaves what it is given as it was."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output."""
        args, kwargs = pytree.tree_map(_own, (args, kwargs))
        output = _first(self.block(*args, **kwargs))
        assert output is not None
        return output


def _own(leaf: Any) -> Any:
    """A copy of something that a block may write to, such as a cache of keys and values."""
    return leaf if isinstance(leaf, (Tensor, *_CONSTANTS)) else copy.deepcopy(leaf)


def _first(output: Any) -> Tensor | None:
    leaves = (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point())
    return next(leaves, None)
