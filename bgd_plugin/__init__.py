"""Compress trained networks by product quantization that preserves each layer's outputs on real inputs."""

import importlib
from typing import TYPE_CHECKING, Any

from bgd_plugin.version import __version__

if TYPE_CHECKING:
    from bgd_plugin import errors as errors
    from bgd_plugin import fx as fx
    from bgd_plugin import results as results
    from bgd_plugin.adapters import load_adapter
    from bgd_plugin.config import BGDConfig, DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig
    from bgd_plugin.errors import BGDError
    from bgd_plugin.exporting.export import export
    from bgd_plugin.files.load import load
    from bgd_plugin.files.save import materialize, save
    from bgd_plugin.fx import BGDPass as BGDPass
    from bgd_plugin.planning.make import plan
    from bgd_plugin.quantization.datafree import quantize_weights
    from bgd_plugin.quantization.quantize import quantize

__all__ = [
    "BGDConfig",
    "BGDError",
    "DistillationConfig",
    "FinetuningConfig",
    "LayerConfig",
    "ReconstructionConfig",
    "__version__",
    "export",
    "load",
    "load_adapter",
    "materialize",
    "plan",
    "quantize",
    "quantize_weights",
    "save",
]

# Where each name is defined. It is imported on first use: torch takes a second or two to import, and the command line
# answers some questions without it.
_HOMES = {
    "BGDConfig": "config",
    "BGDError": "errors",
    "BGDPass": "fx",
    "DistillationConfig": "config",
    "FinetuningConfig": "config",
    "LayerConfig": "config",
    "ReconstructionConfig": "config",
    "export": "exporting.export",
    "load": "files.load",
    "load_adapter": "adapters",
    "materialize": "files.save",
    "plan": "planning.make",
    "quantize": "quantization.quantize",
    "quantize_weights": "quantization.datafree",
    "save": "files.save",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    else:
        try:
            value = importlib.import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
