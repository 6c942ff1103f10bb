"""Convert float modules to product-quantized ones and back, by one table."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bgd_plugin.nn.base import PQModule
from bgd_plugin.nn.conv import PQConv, PQConv1d, PQConv2d, PQConv3d
from bgd_plugin.nn.conv_transpose import (
    PQConvTranspose,
    PQConvTranspose1d,
    PQConvTranspose2d,
    PQConvTranspose3d,
)
from bgd_plugin.nn.embedding import PQEmbedding
from bgd_plugin.nn.linear import PQLinear
from bgd_plugin.nn.own_embedding import embedding_like
from bgd_plugin.nn.weight import FloatWeight, PQWeight
from bgd_plugin.pq.forms import BLOCKS

__all__ = ["materialized", "quantized", "restored_parameter"]


_FORMS: dict[type[nn.Module], Any] = {
    nn.Linear: PQLinear,
    nn.Conv1d: PQConv1d,
    nn.Conv2d: PQConv2d,
    nn.Conv3d: PQConv3d,
    nn.ConvTranspose1d: PQConvTranspose1d,
    nn.ConvTranspose2d: PQConvTranspose2d,
    nn.ConvTranspose3d: PQConvTranspose3d,
    nn.Embedding: embedding_like,
    FloatWeight: PQWeight,
}


def quantized(
    module: nn.Module, codebook: Tensor, codes: Tensor, mask: Tensor | None = None, form: str = BLOCKS
) -> PQModule:
    """Build the product-quantized counterpart of a float module; its bias and training mode are kept.

    Args:
        module: a Conv1d/2d/3d, ConvTranspose1d/2d/3d, Linear, Embedding or FloatWeight.
        codebook, codes: of the shapes that their form has (`pq.forms`): `[codebook_size, block_size]` and
            `[rows, blocks_per_row]` for blocks.
        mask: bool of the shape of the layer's matrix (for all but transposed convolutions, the weight's), false where
            the decoded weight is zero; None: nowhere.
        form: of the codes, "blocks" or "trellis".

    Raises:
        TypeError: a module of another class.
    """
    counterpart = next((pq for kind, pq in _FORMS.items() if isinstance(module, kind)), None)
    if counterpart is None:
        raise TypeError(f"{type(module).__name__} has no product-quantized counterpart")
    result: PQModule = counterpart(codebook, codes, module)
    if form != BLOCKS:
        result.take_form_(form, codes)
    result.mask = mask
    if not isinstance(module, FloatWeight):
        result.stand_for(module)
    return result.train(module.training)


def materialized(
    module: PQLinear | PQConv | PQConvTranspose | PQEmbedding, weight: nn.Parameter | None = None
) -> nn.Module:
    """The float module with the decoded weight, or with `weight`; the bias is shared with `module`.

    Args:
        module: the quantized layer.
        weight: of the shape of the decoded one.
    """
    result: Any = module.to_float()
    module.give_back(result)
    result.weight = restored_parameter(module) if weight is None else weight
    if not isinstance(module, PQEmbedding):
        result.bias = module.bias
    trained: nn.Module = result.train(module.training)
    return trained


def restored_parameter(module: PQModule) -> nn.Parameter:
    """The decoded weight as a new parameter."""
    return nn.Parameter(module.weight.detach().clone(), requires_grad=module.codebook.requires_grad)
