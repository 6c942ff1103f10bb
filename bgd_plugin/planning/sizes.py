"""The bytes of a network that is not compressed yet: of its file, and by the paper's accounting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bgd_plugin.config import BGDConfig
from bgd_plugin.encoding.masks import mask_form, pack_mask
from bgd_plugin.files.format import Stored, file_size, stored
from bgd_plugin.files.rounding import round_floats_, round_weights_
from bgd_plugin.graph import FoundLayer, copy_module, install_, isolate_weights_
from bgd_plugin.nn import PQModule, freeze_norms_
from bgd_plugin.planning.types import PlannedLayer

__all__ = ["paper_bytes", "sketched", "sketched_file_size"]

_COUNTER_BYTES = 8  # by which a batch norm's count of batches may grow in the file while the network is finetuned


def sketched(graph_module: nn.Module, chosen: Sequence[tuple[FoundLayer, PlannedLayer]]) -> nn.Module:
    """The compressed network with empty codebooks and codes, for its sizes alone."""
    sketch: nn.Module = copy_module(graph_module, share_tensors=True)
    isolate_weights_(sketch, [found for found, _ in chosen])
    for found, planned in chosen:
        dtype = torch.int8 if planned.codebook_storage == "int8" else found.weight.dtype
        codebook = torch.empty(planned.codebook_size, planned.block_size, dtype=dtype, device="meta")
        codes = torch.empty(planned.rows, planned.blocks_per_row, dtype=torch.int64, device="meta")
        install_(sketch, found, codebook, codes, planned.kept(found.matrix))
    return sketch


def sketched_file_size(sketch: nn.Module, config: BGDConfig, leftovers: list[str]) -> int:
    """Length of a sketch's file; what stays float in it is rounded as the settings say.

    With a budget it is the length that the file may come to: the work ahead changes statistics and biases, and then a
    narrow type may hold them no more.
    """
    if config.freeze_norms:
        freeze_norms_(sketch)
    round_weights_(sketch, leftovers, config.weight_storage)
    if config.float_storage == "float16":
        round_floats_(sketch)
    if not config.has_budget:
        return file_size(stored(sketch))
    content = stored(sketch)
    whole = sketch.state_dict()
    changing = {name for name, value in whole.items() if _may_change(name, value) and config.float_storage == "float32"}
    tensors = {name: whole[name].to("meta") if name in changing else tensor for name, tensor in content.tensors.items()}
    counters = sum(not t.is_floating_point() and t.ndim == 0 for t in whole.values())
    reserve = _COUNTER_BYTES * counters if config.finetuning else 0
    return file_size(Stored(tensors=tensors, header=content.header)) + reserve


def paper_bytes(model: nn.Module) -> int:
    """Size by the paper's accounting (arXiv 1907.05686, section 4.1), in bytes.

    `log2(k) / d` bits for each quantized weight, codebooks in half precision, every other parameter in single
    precision; masks, which the paper has none of, in the bits that they take.
    """
    layers = list({id(m.codebook): m for m in model.modules() if isinstance(m, PQModule)}.values())  # tied ones once
    codebooks = {id(layer.codebook) for layer in layers}
    bits = sum(layer.codes.numel() * layer.code_bits + 16 * layer.codebook.numel() for layer in layers)
    bits += sum(8 * pack_mask(m.mask, mask_form(m.mask)).numel() for m in layers if m.mask is not None)
    bits += sum(32 * p.numel() for p in model.parameters() if id(p) not in codebooks)
    return -(-bits // 8)


def _may_change(name: str, value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 1 and not name.endswith(".codebook")
