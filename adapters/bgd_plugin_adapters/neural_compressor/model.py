"""What a quantized network has in neural-compressor: its settings by layer, and `save`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn

from bgd_plugin import integration
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM
from bgd_plugin_adapters.neural_compressor.files import save

__all__ = ["QuantizedModel", "as_quantized_"]

_KEY = "bgd_neural_compressor"
_OWN_CLASS = "GraphModuleImpl"


class QuantizedModel(nn.Module):
    """Mixed into the class of a quantized network.

    What it holds survives `copy.deepcopy`, also of a `GraphModule`, which forgets its attributes but keeps its `meta`.
    """

    def _held(self) -> dict[str, Any]:
        place: dict[str, Any] = self.meta if isinstance(self, fx.GraphModule) else self.__dict__
        held: dict[str, Any] = place.setdefault(_KEY, {"qconfig": {}, "report": None})
        return held

    @property
    def is_quantized(self) -> bool:
        """True."""
        return True

    @is_quantized.setter
    def is_quantized(self, value: bool) -> None:
        pass

    @property
    def qconfig(self) -> dict[Any, Any]:
        """The config of each layer, by name and type. An algorithm that comes later adds its own."""
        mapping: dict[Any, Any] = self._held()["qconfig"]
        return mapping

    @qconfig.setter
    def qconfig(self, mapping: dict[Any, Any]) -> None:
        held = self._held()
        held["qconfig"] = _ours_first(held["qconfig"] | mapping)

    @property
    def report(self) -> integration.Report:
        """Bytes and errors by layer, as `bgd_plugin.quantize` gives them."""
        result: integration.Report = self._held()["report"]
        return result

    @property
    def save(self) -> Callable[..., None]:
        """`save(checkpoint_dir)`: see `bgd_plugin_adapters.neural_compressor.files.save`."""
        return partial(save, self)

    @save.setter
    def save(self, value: Any) -> None:
        """A later algorithm's own `save` would forget what stands in this one: not taken."""


def as_quantized_(model: nn.Module, qconfig: dict[Any, Any], report: integration.Report | None) -> Any:
    """Mix `QuantizedModel` into a network, in place."""
    kind = type(model)
    if issubclass(kind, QuantizedModel):
        pass
    elif isinstance(model, fx.GraphModule):
        # each GraphModule has a class of its own, known by this end of its qualified name, which holds its compiled
        # forward; the mixed-in class stands below it, where a copy of the network finds it
        base = next(parent for parent in kind.__mro__ if parent.__qualname__.split(".")[-1] != _OWN_CLASS)
        quantized = type("QuantizedGraph", (QuantizedModel, base), {})
        model.__class__ = type(_OWN_CLASS, (quantized,), {})
        model.__class__.__name__ = kind.__name__
        model.recompile()
    else:
        model.__class__ = type(kind.__name__, (QuantizedModel, kind), {})
    result: Any = model
    result._held().update(qconfig=_ours_first(qconfig), report=report)
    return result


def _ours_first(qconfig: dict[Any, Any]) -> dict[Any, Any]:
    """In this order, since neural-compressor's `save` goes by the first config, and others would leave ours out."""
    return dict(sorted(qconfig.items(), key=lambda item: getattr(item[1], "name", None) != ALGORITHM))
