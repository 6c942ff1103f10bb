"""The graph of a network: trace it, find the layers in it, put modules in their place."""

from bgd_plugin.graph.bake import baked
from bgd_plugin.graph.find import FoundLayer, LeftLayer, call_geometry, call_input, find_layers, layer_has_bias
from bgd_plugin.graph.following import added_to, following_batchnorm, following_batchnorm_node
from bgd_plugin.graph.partition import Block, block_module, partition
from bgd_plugin.graph.replace import isolate_weights_, materialize_, module_paths, swap_
from bgd_plugin.graph.tracer import PQTracer, copy_module, set_modes, trace

__all__ = [
    "Block",
    "FoundLayer",
    "LeftLayer",
    "PQTracer",
    "added_to",
    "baked",
    "block_module",
    "call_geometry",
    "call_input",
    "copy_module",
    "find_layers",
    "following_batchnorm",
    "following_batchnorm_node",
    "isolate_weights_",
    "layer_has_bias",
    "materialize_",
    "module_paths",
    "partition",
    "set_modes",
    "swap_",
    "trace",
]
