"""torch-pruning: it takes channels out before we quantize, never after; and files of pruned networks are loaded.

Nothing has to be registered for the right order: what torch-pruning leaves is an ordinary, smaller network. It is
imported only where `register` is called, so that a machine which loads a pruned network does not need it.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from bgd_plugin.integration import CheckpointError, ConfigError, PQModule, read_file

__all__ = ["narrowed", "register"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BATCH_NORMS = nn.modules.batchnorm._BatchNorm


def register() -> None:
    """Let torch-pruning refuse networks that are quantized already, or under masks.

    Left alone, 1.6.1 does not return from a quantized network and takes all memory: it finds no layer that it knows,
    and takes each codebook for a tensor whose last dimension is channels. From a masked one it takes channels until it
    meets the weight that the mask computes, and leaves the network half pruned.
    """
    import torch_pruning

    build = torch_pruning.DependencyGraph.build_dependency
    if getattr(build, "refuses_quantized", False):
        return

    @functools.wraps(build)
    def checked(self: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            _refuse(name, module)
        return build(self, model, *args, **kwargs)

    checked.refuses_quantized = True  # type: ignore[attr-defined]
    torch_pruning.DependencyGraph.build_dependency = checked


def _refuse(name: str, module: nn.Module) -> None:
    if isinstance(module, PQModule):
        raise ConfigError(
            f"layer {name!r} is quantized: its channels share codewords and cannot be taken out; prune the float "
            "network first, quantize last"
        )
    if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        raise ConfigError(
            f"layer {name!r} is under a mask: make it permanent with torch.nn.utils.prune.remove before channels are "
            "taken out"
        )
    if parametrize.is_parametrized(module):
        raise ConfigError(
            f"layer {name!r} is parametrized: squash its mask (sparsifier.squash_mask()) or remove the parametrization "
            "before channels are taken out"
        )


def narrowed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The architecture of a pruned network, from the dense one and the file: what `bgd_plugin.load` takes as `like`.

    Convolutions, linear layers and norms get the widths of the tensors in the file. What else depends on a width (a
    `view` with a number in it, say) is the network's own affair; `load` names every tensor that still does not fit.

    Args:
        model: a network as it was before pruning; it is left untouched, its weights are not used.
        path: a file that `bgd_plugin.save` wrote.

    Returns:
        a copy on the meta device, in the mode of `model`.

    Raises:
        CheckpointError: the file cannot be read, or is wider somewhere than the network.
    """
    shapes = _shapes(path)
    result = copy.deepcopy(model).to("meta")
    for name, module in result.named_modules():
        shape = shapes.get(name)
        if shape is None:
            continue
        own = tuple(getattr(module, "weight", torch.empty(0)).shape)
        if len(own) != len(shape) or any(mine < theirs for mine, theirs in zip(own, shape, strict=True)):
            raise CheckpointError(
                f"{path}: {name!r} has a weight {list(shape)} in the file, {list(own)} in the network, which is not "
                "the one that was pruned"
            )
        _narrow_(module, shape)
    return result


def _shapes(path: str | os.PathLike[str]) -> dict[str, tuple[int, ...]]:
    """Shape of the weight of each module in a file, by the module's path; shared ones under all their paths."""
    tensors, header = read_file(path)
    shapes = {n.removesuffix(".weight"): tuple(t.shape) for n, t in tensors.items() if n.endswith(".weight")}
    try:
        shapes |= {name: tuple(map(int, entry[3])) for name, entry in header.get("layers", {}).items()}
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{path}: the layers in its header are damaged ({error!r})") from error
    for name, first in header.get("aliases", {}).items():
        module, _, attribute = name.rpartition(".")
        shared = str(first).rpartition(".")[0]
        if attribute in ("weight", "codebook") and shared in shapes:
            shapes[module] = shapes[shared]
    return shapes


def _narrow_(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a module on the meta device the width that its weight has in the file."""
    own: Any = module
    if isinstance(module, nn.Linear):
        own.out_features, own.in_features = shape
    elif isinstance(module, _CONVOLUTIONS):
        if own.groups == own.in_channels and own.groups > 1:
            own.groups = shape[0] // max(1, own.out_channels // own.in_channels)
        own.out_channels, own.in_channels = shape[0], shape[1] * own.groups
    elif isinstance(module, _BATCH_NORMS):
        own.num_features = shape[0]
    elif isinstance(module, nn.GroupNorm):
        own.num_channels = shape[0]
    elif isinstance(module, nn.LayerNorm):
        own.normalized_shape = shape
    else:
        return
    own.weight = nn.Parameter(torch.empty(shape, dtype=own.weight.dtype, device="meta"), own.weight.requires_grad)
    rows = shape[:1] if not isinstance(module, nn.LayerNorm) else shape
    if getattr(own, "bias", None) is not None:
        own.bias = nn.Parameter(torch.empty(rows, dtype=own.bias.dtype, device="meta"), own.bias.requires_grad)
    for buffer in ("running_mean", "running_var"):
        if getattr(own, buffer, None) is not None:
            setattr(own, buffer, torch.empty(rows, dtype=getattr(own, buffer).dtype, device="meta"))
