"""Quantizers of other libraries, layer by layer; none of them looks at data.

Each gets an ordinary layer that holds the weight, with the library's own defaults wherever there are any. Floats that
come with the codes (scales, codebooks) are rounded to half precision, as everything else in the file.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration import LayerInputs
from bgd_plugin.encoding.codes import pack
from tests.benchmarks.peers.build import PackedWeight, Quantizer

__all__ = ["coremltools_palettes", "hqq", "quanto", "torchao_codebook"]


def quanto(kind: str) -> Quantizer:
    """optimum-quanto, `qint2` or `qint4`: its tensors, as its own state dict packs them."""

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        from optimum import quanto as library
        from optimum.quanto.library.extensions import get_extension

        # Its own unpacking is compiled when it is first called, which takes a compiler.
        get_extension("quanto_cpp")._lib = SimpleNamespace(unpack=_unpacked)
        holder = nn.Sequential(_layer(weight))
        library.quantize(holder, weights=getattr(library, kind))
        library.freeze(holder)
        module: Any = holder[0]
        state = {name: t for name, t in holder.state_dict().items() if name.startswith("0.weight.")}
        tensors = {name.removeprefix("0.weight."): _halved(t) for name, t in state.items()}
        return PackedWeight(weight=module.weight.dequantize(), tensors=tensors)

    return quantize


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes of `bits` bits as quanto packs them: first all that lie in the lowest bits, then the next."""
    return torch.cat([packed >> shift & 2**bits - 1 for shift in range(0, 8, bits)])


def hqq(bits: int, group_size: int = 64) -> Quantizer:
    """HQQ: grids of groups of a row, their zero points fitted to the weights; scale and zero point for each group."""

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        from hqq.core.quantize import Quantizer as Library

        settings = {"nbits": bits, "group_size": group_size, "axis": 1, "device": "cpu", "bitpack": False}
        codes, meta = Library.quantize(weight, compute_dtype=torch.float32, **settings)
        scale, zero = meta["scale"].half(), meta["zero"].half()
        decoded = (codes.float() - zero.float()) * scale.float()
        packed = pack(codes.flatten().to(torch.int64), bits)
        return PackedWeight(
            weight=decoded.reshape(weight.shape), tensors={"codes": packed, "scale": scale, "zero": zero}
        )

    return quantize


def torchao_codebook(code_type: str, block_size: int) -> Quantizer:
    """Codebooks of torchao, one scale for each row; convolutions are handed over as matrices, since it takes no others.

    Its codes lie in tensors of its own; the bytes are those of the codes packed to their bits.
    """

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        from torchao.prototype.quantization.codebook.codebook_quantized_tensor import CodebookWeightOnlyConfig
        from torchao.quantization import quantize_

        holder = nn.Sequential(_layer(weight.flatten(1)))
        quantize_(holder, CodebookWeightOnlyConfig(getattr(torch, code_type), (1, block_size)))
        found: Any = holder[0].weight
        codes = found.codes.get_plain() if hasattr(found.codes, "get_plain") else found.codes
        packed = pack(codes.to(torch.int64).flatten(), int(code_type.removeprefix("uint")))
        tensors = {"codes": packed, "codebook": found.codebook.half(), "scales": found.scales.half()}
        return PackedWeight(weight=found.dequantize(), tensors=tensors)

    return quantize


def coremltools_palettes(bits: int, cluster_dim: int = 1) -> Quantizer:
    """Palettization of coremltools, by k-means: one look-up table for each layer.

    The bytes are those of codes packed to their bits and of the table in half precision; a Core ML file holds the same.
    """

    def quantize(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
        from coremltools.optimize.torch import palettization as library

        logging.disable(logging.INFO)  # it reports on each worker of each layer
        settings: dict[str, Any] = {"n_bits": bits, "granularity": "per_tensor"}
        settings |= {"cluster_dim": cluster_dim} if cluster_dim > 1 else {}
        config = library.PostTrainingPalettizerConfig.from_dict({"global_config": settings})
        compressed: Any = library.PostTrainingPalettizer(nn.Sequential(_layer(weight)), config).compress()
        decoded = compressed[0].weight.detach()
        if torch.equal(decoded, weight):  # it leaves layers alone whose channels are no multiple of `cluster_dim`
            return PackedWeight(weight=weight, tensors={"weight": weight.half()})
        if cluster_dim == 1:
            table, codes = decoded.flatten().unique(return_inverse=True)
        else:  # vectors run along the output channels
            table, codes = decoded.transpose(0, -1).reshape(-1, cluster_dim).unique(dim=0, return_inverse=True)
        return PackedWeight(weight=decoded, tensors={"codes": pack(codes, bits), "table": table.half()})

    return quantize


def _layer(weight: Tensor) -> nn.Module:
    """An ordinary layer without bias around a weight."""
    layer: nn.Module
    if weight.ndim == 2:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    else:
        rows, columns, *kernel = weight.shape
        layer = nn.Conv2d(columns, rows, (kernel[0], kernel[1]), bias=False)
    layer.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=False)
    return layer.eval()


def _halved(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
