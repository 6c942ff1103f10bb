"""Compress trained networks by product quantization that preserves each layer's outputs on real inputs."""

from bgd_plugin import errors as errors
from bgd_plugin import fx as fx
from bgd_plugin import results as results
from bgd_plugin.adapters import load_adapter
from bgd_plugin.config import BGDConfig, DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig
from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.export import export
from bgd_plugin.files.network import load, materialize, save
from bgd_plugin.fx import BGDPass as BGDPass
from bgd_plugin.planning.make import plan
from bgd_plugin.quantization.datafree import quantize_weights
from bgd_plugin.quantization.quantize import quantize
from bgd_plugin.version import __version__

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
