"""A network from weights that a peer has quantized: the same walk, batch-norm step and file as the library's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import LayerInputs, Walk, collect_batches
from bgd_plugin.correction import correct_batchnorm_, is_batchnorm
from bgd_plugin.files.format import Stored, file_size, stored
from bgd_plugin.files.rounding import round_floats_
from bgd_plugin.graph import copy_module, isolate_weights_, trace
from bgd_plugin.planning.survey import surveyed
from tests.benchmarks.peers.subjects import Subject

__all__ = ["Compressed", "PackedWeight", "Quantizer", "compress"]


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A network, and the length of the file that holds it."""

    model: nn.Module
    bytes: int


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """What a peer makes of a weight.

    Attributes:
        weight: dequantized, in the shape of the float one.
        tensors: all that a file needs to make it again, as it would lie there: codes packed, the rest half precision.
    """

    weight: Tensor
    tensors: dict[str, Tensor]


Quantizer = Callable[[Tensor, LayerInputs], PackedWeight]
"""From a weight `[C_out, C_in, *kernel]` or `[C_out, C_in]`, and the inputs that it meets in the compressed network."""


@torch.no_grad()
def compress(subject: Subject, quantizer: Quantizer) -> Compressed:
    """Quantize the layers that the library's default settings quantize, in the order in which they run.

    Each batch norm is corrected as `BGDConfig(batchnorm="matched")` does it, before the layers after it are reached.
    What stays float is rounded to half precision. The file's length is that of a safetensors file with every tensor.
    """
    student = trace(copy_module(subject.model)).eval()
    found = surveyed(student, bgd.BGDConfig(max_divergence=None), original=subject.model).found
    isolate_weights_(student, found)
    batches = collect_batches(subject.calibration, subject.model, device=torch.device("cpu"), forward=None)
    walk = Walk(student, batches, copy_module(student, share_tensors=True))
    layers = {layer.target if layer.functional else layer.calls[0]: layer for layer in found}
    packed: dict[str, Tensor] = {}
    for node in walk.nodes():
        layer = layers.get(node.name) or layers.get(str(node.target))
        if layer:
            result = quantizer(layer.weight.detach(), LayerInputs(walk, layer.name, layer.calls))
            module: Any = student.get_submodule(layer.target)
            module.weight = nn.Parameter(result.weight.reshape(layer.weight.shape).contiguous(), requires_grad=False)
            packed |= {f"{layer.target}.weight.{name}": tensor for name, tensor in result.tensors.items()}
            walk.mark_changed(layer.target)
        elif is_batchnorm(student, node) and correct_batchnorm_(walk, node, "matched"):
            walk.mark_changed(str(node.target))
    round_floats_(student)
    content = stored(student)
    weights = {f"{layer.target}.weight" for layer in found}
    rest = {name: tensor for name, tensor in content.tensors.items() if name not in weights}
    assert len(rest) + len(weights) == len(content.tensors)
    return Compressed(model=student, bytes=file_size(Stored(tensors=rest | packed, header=content.header)))
