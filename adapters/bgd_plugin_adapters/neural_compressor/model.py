"""Attributes that neural-compressor expects of a quantized network: settings by layer, and `save`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import fx, nn

from bgd_plugin import integration
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM
from bgd_plugin_adapters.neural_compressor.saving import save

__all__ = ["QuantizedModel", "as_quantized_"]

_KEY = "bgd_neural_compressor"
_OWN_CLASS = "GraphModuleImpl"


class QuantizedModel(nn.Module):
    """Mixed into the class of a quantized network.

    Its values survive `copy.deepcopy`, also of a `GraphModule`, whose copy loses attributes but keeps `meta`.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle by a class that can be imported, with the values held here."""
        held = dict(self._held())
        if isinstance(self, fx.GraphModule):
            rebuild, arguments = self.__reduce__()
            return _unpickled_graph, (rebuild, arguments, held)
        return _blank, (_float_class(type(self)),), self.__getstate__()  # type: ignore[no-untyped-call]

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
        """Ignore the value: a quantized network stays one."""

    @property
    def qconfig(self) -> dict[Any, Any]:
        """The config of each layer, by name and type; assigning adds the configs of a later algorithm."""
        mapping: dict[Any, Any] = self._held()["qconfig"]
        return mapping

    @qconfig.setter
    def qconfig(self, mapping: dict[Any, Any]) -> None:
        """Add the configs of `mapping`, by name and type of layers."""
        held = self._held()
        held["qconfig"] = _ours_first(held["qconfig"] | mapping)

    @property
    def report(self) -> integration.Report:
        """Bytes and errors by layer, as `bgd_plugin.quantize` gives them."""
        result: integration.Report = self._held()["report"]
        return result

    @property
    def save(self) -> Callable[..., None]:
        """`save(checkpoint_dir)`: see `bgd_plugin_adapters.neural_compressor.saving.save`."""
        return partial(save, self)

    @save.setter
    def save(self, value: Any) -> None:
        """Ignore the value, a later algorithm's own `save`, which would leave our layers out."""


def as_quantized_(model: nn.Module, qconfig: dict[Any, Any], report: integration.Report | None) -> Any:
    """Mix `QuantizedModel` into the class of a network, in place.

    Args:
        model: the quantized network.
        qconfig: the config of each layer, by name and type.
        report: of `bgd_plugin.quantize`; None for a network that was loaded.

    Returns:
        `model`.
    """
    kind = type(model)
    if issubclass(kind, QuantizedModel):
        pass
    elif isinstance(model, fx.GraphModule):
        # each GraphModule has its own class with its compiled forward, recognised by the end of its qualified name; the
        # mixed-in class is inserted below it, where copies of the network find it
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


def _float_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of the network before `QuantizedModel` was mixed in."""
    bases: tuple[Any, ...] = kind.__bases__
    base: type[nn.Module] = bases[1] if bases[0] is QuantizedModel else kind
    return base


def _blank(kind: type[nn.Module]) -> nn.Module:
    """An object without state, of the class of a quantized network."""
    mixed: type[nn.Module] = type(kind.__name__, (QuantizedModel, kind), {"__module__": kind.__module__})
    return mixed.__new__(mixed)


def _unpickled_graph(rebuild: Callable[..., Any], arguments: Any, held: dict[str, Any]) -> Any:
    return as_quantized_(rebuild(*arguments), held["qconfig"], held["report"])


def _ours_first(qconfig: dict[Any, Any]) -> dict[Any, Any]:
    """Sort our configs first: neural-compressor's `save` uses the first one's, and others leave our layers out."""
    return dict(sorted(qconfig.items(), key=lambda item: getattr(item[1], "name", None) != ALGORITHM))
