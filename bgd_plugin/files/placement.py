"""Quantized layers in a network of the user's own class: transplant them from a graph, or insert empty ones.

Frameworks that depend on a model's class (to generate, save or restore) need that class back: the layers of a quantized
graph are moved into a copy of the user's network, under the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bgd_plugin.config import MAX_CODEBOOK_SIZE
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.files.rotated import make_rotated_, rotated_in
from bgd_plugin.graph import (
    FoundLayer,
    Replaced,
    baked,
    copy_module,
    find_layers,
    fold_parametrizations_,
    follow_,
    install_,
    swap_,
    widen_,
)
from bgd_plugin.nn import FrozenNorm, NarrowModule, PQModule, RotatedNorm, has_running_statistics, is_batchnorm
from bgd_plugin.pq.forms import BLOCKS, FORMS, TRELLIS, Sizes

__all__ = ["Placement", "make_room_", "placement_in", "placement_of", "transplant_", "transplanted"]

_MASKED, _TRELLIS = 1, 2

Placement = dict[str, tuple[int, ...]]
"""From a module's path to its block size and its codebook size; then, unless it is 0, the sum of 1 if a mask preserves
its zeros and 2 if its codes are trellis windows.

The tuple is empty for a frozen batch norm, and holds the width alone for a norm that has a matrix behind it.
"""


def placement_of(model: nn.Module) -> Placement:
    """The placement of a network's quantized modules and frozen norms.

    Args:
        model: the network; a shared module is listed once.

    Returns:
        a placement by path.
    """
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PQModule)}
    frozen: Placement = {path: () for path, module in model.named_modules() if isinstance(module, FrozenNorm)}
    rotated: Placement = {path: (width,) for path, width in rotated_in(model).items()}
    return (
        frozen
        | rotated
        | {p: (m.block_size, m.codebook_size, *_more(m.form.name, m.mask is not None)) for p, m in layers.items()}
    )


def _more(form: str, is_masked: bool) -> tuple[int, ...]:
    more = is_masked * _MASKED + (form == TRELLIS) * _TRELLIS
    return (more,) if more else ()


def placement_in(state: Mapping[str, Any]) -> Placement:
    """The placement of the quantized modules in a state dict.

    Args:
        state: the state dict.

    Returns:
        a placement by path.
    """
    layers: Placement = {}
    for name in state:
        path, _, attribute = name.rpartition(".")
        codebook = state.get(f"{path}.codebook")
        if attribute == "codes" and isinstance(codebook, torch.Tensor) and codebook.ndim in (1, 2):
            form = TRELLIS if codebook.ndim == 1 else BLOCKS
            layers[path] = (*FORMS[form].sizes(codebook.shape), *_more(form, f"{path}.mask" in state))
    return layers


def transplanted(model: nn.Module, compressed: nn.Module) -> nn.Module:
    """A copy of `model`, of the same class, with the quantized layers and all other state of `compressed`.

    Args:
        model: the float network; not changed.
        compressed: the result of `quantize` for it; its tensors are shared with the copy.

    Returns:
        the copy.

    Raises:
        ConfigError: the model has pruning masks.
    """
    result: nn.Module = copy_module(baked(model))
    transplant_(result, compressed)
    return result


def transplant_(model: nn.Module, compressed: nn.Module, *, statistics_only: bool = False) -> None:
    """Move the quantized layers and all other state of `compressed` into `model`, under the same names, in place.

    Args:
        model: the float network.
        compressed: its tensors are shared with `model` afterwards.
        statistics_only: of the buffers, take over those of norms alone, which are all that a fit changes.

    Raises:
        ConfigError: the model has pruning masks, which recompute its weights at each call.
    """
    widen_(model)
    if baked(model) is not model:
        raise ConfigError("the network has pruning masks: make them permanent first (torch.nn.utils.prune.remove)")
    fold_parametrizations_(model)
    ours = (PQModule, NarrowModule, FrozenNorm, RotatedNorm)
    layers = {path: module for path, module in compressed.named_modules() if isinstance(module, ours)}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    same = {name: group for group in names.values() for name in group}
    replaced: Replaced = []
    for path, layer in layers.items():
        for target in [path, *(name for name in same.get(path, ()) if name not in layers)]:
            swap_(model, target, layer, replaced)
    follow_(model, replaced)
    owners = dict(model.named_modules(remove_duplicate=False))
    for path, module in compressed.named_modules(remove_duplicate=False):
        owner = owners.get(path)
        if owner is None or owner is module:
            continue
        if isinstance(owner, torch.jit.ScriptModule):
            owner.load_state_dict(module.state_dict())
            continue
        owner._parameters.update({k: v for k, v in module._parameters.items() if k in owner._parameters})
        if not statistics_only or has_running_statistics(owner):
            owner._buffers.update({k: v for k, v in module._buffers.items() if k in owner._buffers})


def make_room_(model: nn.Module, placement: Mapping[str, Sequence[int]]) -> None:
    """Replace float layers by empty quantized ones, in place, so that a state dict can be loaded.

    The new tensors are on the device of the layer's weight.

    Args:
        model: the float network.
        placement: block size and codebook size per path.

    Raises:
        CheckpointError: a path has no convolution or linear layer, or a block size does not divide its layer's row; the
            message names every mismatch.
    """
    fold_parametrizations_(model)
    found = {target: layer for layer in find_layers(model)[0] for target in (layer.target, *layer.tied)}
    norms = {path: norm for path, norm in model.named_modules() if is_batchnorm(norm)}
    frozen = [path for path, sizes in placement.items() if sizes == [] or sizes == ()]
    rotated = {path: sizes[0] for path, sizes in placement.items() if _is_rotated(sizes)}
    placement = {path: sizes for path, sizes in placement.items() if path not in frozen and path not in rotated}
    problems = [f"{path!r}: the network has no such batch norm" for path in frozen if path not in norms]
    problems += [problem for path, sizes in placement.items() if (problem := _misfit(found.get(path), sizes, path))]
    problems += make_rotated_(model, rotated)
    if problems:
        raise CheckpointError("the quantized layers do not fit the network:" + "".join(f"\n  {p}" for p in problems))
    for path in frozen:
        swap_(model, path, FrozenNorm.of(norms[path]))
    for layer in {id(found[path]): found[path] for path in placement}.values():
        block_size, codebook_size, more = (*placement[layer.target], 0)[:3]
        weight, form = layer.weight, TRELLIS if more & _TRELLIS else BLOCKS
        sizes = Sizes(rows=layer.rows, columns=layer.columns, block_size=block_size, codebook_size=codebook_size)
        codebook, codes = FORMS[form].empty(sizes, dtype=weight.dtype, device=weight.device)
        is_masked = more & _MASKED
        mask = torch.ones(layer.matrix.shape, dtype=torch.bool, device=weight.device) if is_masked else None
        for module in install_(model, layer, codebook, codes, mask, form):
            module.codebook.requires_grad_(weight.requires_grad)


def _is_rotated(sizes: Sequence[int]) -> bool:
    return isinstance(sizes, Sequence) and len(sizes) == 1


def _misfit(layer: FoundLayer | None, sizes: Sequence[int], path: str) -> str:
    if layer is None:
        return f"{path!r}: the network has no such convolution or linear layer that is still float"
    if not isinstance(sizes, Sequence) or len(sizes) not in (2, 3) or not all(isinstance(x, int) for x in sizes):
        return f"{path!r}: found {sizes!r}, expected its block size and codebook size"
    block_size, codebook_size, more = (*sizes, 0)[:3]
    if more & _TRELLIS and (block_size, codebook_size) != FORMS[TRELLIS].sizes(()):
        return f"{path!r}: {sizes!r} are no sizes of a layer with trellis codes"
    if block_size < 1 or layer.columns % block_size or not 2 <= codebook_size <= MAX_CODEBOOK_SIZE:
        return f"{path!r}: {layer.columns} weights per row, blocks of {block_size}, {codebook_size} codewords"
    return ""
