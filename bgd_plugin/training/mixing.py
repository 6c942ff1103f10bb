"""Mix samples with each other, so that training on a few hundred of them does not overfit."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch
from bgd_plugin.errors import CalibrationError

__all__ = ["mixed"]


def mixed(batch: Batch, number: int) -> Batch:
    """Mix each sample with another one of the batch: by blending, or, for images in every second step, by pasting in
    a square of the other image.

    The teacher sees the mixed samples too, so no labels are needed.

    Args:
        batch: floating-point tensors with samples along the first dimension; a batch of one sample is unchanged.
        number: the step's number, which alone determines the random draws.

    Raises:
        CalibrationError: a tensor that cannot be blended, such as token numbers.

    **Source**: Zhang et al., "mixup", arXiv 1710.09412; Yun et al., "CutMix", arXiv 1905.04899; the benefit
    for distillation: Beyer et al., arXiv 2106.05237.
    """
    count = batch.size
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(count, generator=generator, device=generator.device)
    weights = torch.rand(count, generator=generator, dtype=torch.float32, device=generator.device)
    below, right, share = torch.rand(3, generator=generator, dtype=torch.float32, device=generator.device).tolist()

    def blended(tensor: Tensor) -> Tensor:
        shape = (count, *(1 for _ in tensor.shape[1:]))
        return torch.lerp(tensor[order.to(tensor.device)], tensor, weights.to(tensor).reshape(shape))

    def pasted(tensor: Tensor) -> Tensor:
        top, height = _span(below, share, tensor.shape[2])
        left, width = _span(right, share, tensor.shape[3])
        result = tensor.clone()
        result[:, :, top : top + height, left : left + width] = tensor[
            order.to(tensor.device), :, top : top + height, left : left + width
        ]
        return result

    def mix(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or tensor.shape[:1] != (count,):
            raise CalibrationError(
                f"finetuning: mixing=True cannot blend a tensor of {str(tensor.dtype).removeprefix('torch.')} "
                f"{list(tensor.shape)}: set mixing=False"
            )
        chosen: Callable[[Tensor], Tensor] = pasted if number % 2 and tensor.ndim == 4 else blended
        return chosen(tensor)

    if count < 2:
        return batch
    return Batch(*pytree.tree_map_only(Tensor, mix, (batch.args, batch.kwargs)))


def _span(place: float, share: float, size: int) -> tuple[int, int]:
    """Start and length, along one dimension, of a square that covers `share` of the image."""
    length = int(size * share**0.5)
    return int(place * (size - length + 1)), length
