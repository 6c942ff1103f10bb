"""The graph of a network: trace it, find the layers in it, put modules in their place."""

from bgd_plugin.graph.bake import baked
from bgd_plugin.graph.find import FoundLayer, LeftLayer, call_geometry, call_input, find_layers, layer_has_bias
from bgd_plugin.graph.following import following_batchnorm
from bgd_plugin.graph.replace import isolate_weights_, materialize_, module_paths, swap_
from bgd_plugin.graph.tracer import PQTracer, copy_module, set_modes, trace

__all__ = [
    "FoundLayer",
    "LeftLayer",
    "PQTracer",
    "baked",
    "call_geometry",
    "call_input",
    "copy_module",
    "find_layers",
    "following_batchnorm",
    "isolate_weights_",
    "layer_has_bias",
    "materialize_",
    "module_paths",
    "set_modes",
    "swap_",
    "trace",
]
