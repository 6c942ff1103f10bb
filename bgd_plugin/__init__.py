"""Product quantization of trained networks, by what their layers compute on real inputs."""

from bgd_plugin.checkpoint import load, materialize, save
from bgd_plugin.config import BGDConfig
from bgd_plugin.datafree import quantize_module, quantize_weights
from bgd_plugin.discovery import load_adapter
from bgd_plugin.errors import BGDError, CalibrationError, CheckpointError, ConfigError, TraceError
from bgd_plugin.passes import BGDPass
from bgd_plugin.placement import make_room_, placement_in, placement_of, transplant_, transplanted
from bgd_plugin.plan import layers_in, plan
from bgd_plugin.planned import Plan
from bgd_plugin.quantize import Quantized, quantize
from bgd_plugin.report import Report
from bgd_plugin.stages import DistillationConfig, FinetuningConfig, LayerConfig, ReconstructionConfig
from bgd_plugin.version import __version__

__all__ = [
    "BGDConfig",
    "BGDError",
    "BGDPass",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "DistillationConfig",
    "FinetuningConfig",
    "LayerConfig",
    "Plan",
    "Quantized",
    "ReconstructionConfig",
    "Report",
    "TraceError",
    "__version__",
    "layers_in",
    "load",
    "load_adapter",
    "make_room_",
    "materialize",
    "placement_in",
    "placement_of",
    "plan",
    "quantize",
    "quantize_module",
    "quantize_weights",
    "save",
    "transplant_",
    "transplanted",
]
