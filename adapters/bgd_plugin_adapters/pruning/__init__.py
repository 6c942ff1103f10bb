"""torch-pruning: it takes channels out before we quantize, never after; and files of pruned networks are loaded.

Nothing has to be registered for the right order: what torch-pruning leaves is an ordinary, smaller network. It is
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

    Layers, norms, activations with parameters, attention, and parameters of modules of any other kind get the widths
    of the tensors in the file. What else depends on a width (a `view` with a number in it, say) is the network's own
    affair; `load` names every tensor that still does not fit.

    Args:
        model: a network as it was before pruning; it is left untouched, its weights are not used.
        path: a file that `bgd_plugin.save` wrote.

    Returns:
        a copy on the meta device, in the mode of `model`.

    Raises:
        CheckpointError: the file cannot be read, is wider somewhere than the network, or needs a width that cannot be
            told from it; then build the pruned network yourself, and give it to `load` as `like=`.
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
