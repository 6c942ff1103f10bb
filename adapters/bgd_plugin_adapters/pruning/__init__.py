"""torch-pruning: remove channels before quantization, never after; and load files of pruned networks.

The right order needs no registration: a pruned network is an ordinary, smaller one. It is
imported only where `register` is called, so that a machine which loads a pruned network does not need it.
"""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

from torch import nn
from torch.nn.utils import parametrize, prune

from bgd_plugin.integration import ConfigError, PQModule
from bgd_plugin_adapters.pruning.widths import file_shapes, narrow_

__all__ = ["narrowed", "register"]


def register() -> None:
    """Make torch-pruning refuse networks that are already quantized, or masked.

    Otherwise 1.6.1 does not return from a quantized network and uses all memory: it finds no layer that it supports,
    and treats each codebook as a tensor whose last dimension is channels. It removes channels from a masked network
    until it meets a weight computed by a mask, and leaves the network half pruned.
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
            f"layer {name!r} is quantized: its channels share codewords and cannot be removed; prune the float "
            "network first, quantize last"
        )
    if any(isinstance(hook, prune.BasePruningMethod) for hook in module._forward_pre_hooks.values()):
        raise ConfigError(
            f"layer {name!r} has a pruning mask: make it permanent with torch.nn.utils.prune.remove before channels "
            "are removed"
        )
    if parametrize.is_parametrized(module):
        raise ConfigError(
            f"layer {name!r} is parametrized: squash its mask (sparsifier.squash_mask()) or remove the parametrization "
            "before channels are removed"
        )


def narrowed(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """The architecture of a pruned network, from the dense one and the file, for `bgd_plugin.load` as `like`.

    Layers, norms, activations with parameters, attention, and parameters of modules of any other kind get the widths
    of the tensors in the file. Code that depends on a width, such as a `view` with a fixed number, is not changed;
    `load` names every tensor that still does not fit.

    Args:
        model: the network before pruning; it is not changed, and its weights are not used.
        path: a file that `bgd_plugin.save` wrote.

    Returns:
        a copy on the meta device, in the mode of `model`.

    Raises:
        CheckpointError: the file cannot be read, has a wider tensor than the network, or does not determine a width;
            then build the pruned network yourself, and give it to `load` as `like=`.
    """
    shapes = file_shapes(path)
    result = copy.deepcopy(model).to("meta")
    for name, module in result.named_modules():
        narrow_(
            module, {part: shapes[full] for part, full in _parts(name, module) if full in shapes}, f"{path}: {name!r}"
        )
    return result


def _parts(name: str, module: nn.Module) -> list[tuple[str, str]]:
    """Names of a module's own tensors, in it and in the file."""
    own = [*module._parameters, *module._buffers]
    return [(part, f"{name}.{part}".lstrip(".")) for part in own]
