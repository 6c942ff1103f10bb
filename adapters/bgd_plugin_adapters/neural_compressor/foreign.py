"""Layers quantized by another algorithm of neural-compressor: they stay as they are, and are saved separately."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor, fx, nn

from bgd_plugin.integration import PQTracer, copy_module, set_modes

__all__ = ["detached_state", "foreign_layers", "restored", "traced", "without_foreign"]


_logger = logging.getLogger(__name__)


def foreign_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of neural-compressor's own classes in a network, by name."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in found)
        if _is_foreign(module) and not is_inside:
            found[name] = module
    return found


def _is_foreign(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] == "neural_compressor"


class _Tracer(PQTracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return _is_foreign(m) or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> nn.Module:
    """The network itself, or its graph if it holds layers that only neural-compressor can run.

    A network that cannot be traced stays as it is: the core then runs it, layers of neural-compressor included.
    """
    if isinstance(model, fx.GraphModule) or not foreign_layers(model):
        return model
    modes = {path: module.training for path, module in model.named_modules()}
    model.eval()
    try:
        graph = fx.GraphModule(model, _Tracer().trace(model), type(model).__name__)
    except Exception as error:  # a tracer runs the user's forward: anything may come out of it
        _logger.info("the network cannot be traced around layers of neural-compressor (%s)", error)
        return model
    finally:
        set_modes(model, modes)
    set_modes(graph, modes)
    return graph


def detached_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of all foreign layers, by full name."""
    layers = foreign_layers(model)
    return {f"{path}.{name}": t for path, layer in layers.items() for name, t in layer.state_dict().items()}


def without_foreign(model: nn.Module) -> Any:
    """A copy over the same tensors, with an identity in place of each foreign layer."""
    return restored(copy_module(model, share_tensors=True), dict.fromkeys(foreign_layers(model), nn.Identity()))


def restored(model: Any, layers: dict[str, nn.Module]) -> Any:
    """Put layers, by path, into a model, in place."""
    for path, layer in layers.items():
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, layer)
    return model
