"""What adapters may use beside the public names: the only other module of the core that they import."""

from bgd_plugin.config import FAMILIES
from bgd_plugin.encoding.codes import code_dtype, pack, unpack
from bgd_plugin.errors import CalibrationError, CheckpointError, ConfigError, TraceError
from bgd_plugin.files.placement import make_room_, placement_in, placement_of, transplant_, transplanted
from bgd_plugin.files.save import read_file
from bgd_plugin.graph import PQTracer, become_, copy_module, materialize_, narrow_, set_modes, widen_
from bgd_plugin.graph.computed import compute_parameter_, loosen_parameter_, restore_parameter_
from bgd_plugin.nn import NarrowLinear, NarrowModule, PQLinear, PQModule, PQWeight
from bgd_plugin.planning.make import layers_in
from bgd_plugin.quantization.datafree import quantize_module
from bgd_plugin.results import LayerReport, Plan, PlannedLayer, Quantized, Report, SkippedLayer
from bgd_plugin.support.tables import mib

__all__ = [
    "FAMILIES",
    "CalibrationError",
    "CheckpointError",
    "ConfigError",
    "LayerReport",
    "NarrowLinear",
    "NarrowModule",
    "PQLinear",
    "PQModule",
    "PQTracer",
    "PQWeight",
    "Plan",
    "PlannedLayer",
    "Quantized",
    "Report",
    "SkippedLayer",
    "TraceError",
    "become_",
    "code_dtype",
    "compute_parameter_",
    "copy_module",
    "layers_in",
    "loosen_parameter_",
    "make_room_",
    "materialize_",
    "mib",
    "narrow_",
    "pack",
    "placement_in",
    "placement_of",
    "quantize_module",
    "read_file",
    "restore_parameter_",
    "set_modes",
    "transplant_",
    "transplanted",
    "unpack",
    "widen_",
]
