"""The graph of a network, or the network itself where it has none: find the layers, put modules in their place."""

from bgd_plugin.graph.bake import baked
from bgd_plugin.graph.calls import attribute, call_geometry, call_input, looks_rows_up, pointwise, spoken
from bgd_plugin.graph.computed import module_at, module_or_none
from bgd_plugin.graph.copying import copy_module, set_modes
from bgd_plugin.graph.cuts import Block, block_module, partition
from bgd_plugin.graph.finding_layers import find_layers
from bgd_plugin.graph.fold import fold_parametrizations_
from bgd_plugin.graph.following import added_to, following_batchnorm, following_batchnorm_node
from bgd_plugin.graph.front import Front, front_end, retraced, unwrapped
from bgd_plugin.graph.in_place import state_kept, untouched
from bgd_plugin.graph.layer import FoundLayer, LeftLayer
from bgd_plugin.graph.narrowing import narrow_, widen_
from bgd_plugin.graph.parts import batchnorms_in_parts
from bgd_plugin.graph.pickling import make_picklable_
from bgd_plugin.graph.place import layer_at
from bgd_plugin.graph.references import followed
from bgd_plugin.graph.replace import (
    Replaced,
    become_,
    float_module,
    follow_,
    install_,
    isolate_weights_,
    isolated_weights,
    materialize_,
    module_paths,
    release_,
    swap_,
)
from bgd_plugin.graph.tracer import FROM_DATA, PQTracer, is_quantized_elsewhere, trace
from bgd_plugin.graph.world import isolated

__all__ = [
    "FROM_DATA",
    "Block",
    "FoundLayer",
    "Front",
    "LeftLayer",
    "PQTracer",
    "Replaced",
    "added_to",
    "attribute",
    "baked",
    "batchnorms_in_parts",
    "become_",
    "block_module",
    "call_geometry",
    "call_input",
    "copy_module",
    "find_layers",
    "float_module",
    "fold_parametrizations_",
    "follow_",
    "followed",
    "following_batchnorm",
    "following_batchnorm_node",
    "front_end",
    "install_",
    "is_quantized_elsewhere",
    "isolate_weights_",
    "isolated",
    "isolated_weights",
    "layer_at",
    "looks_rows_up",
    "make_picklable_",
    "materialize_",
    "module_at",
    "module_or_none",
    "module_paths",
    "narrow_",
    "partition",
    "pointwise",
    "release_",
    "retraced",
    "set_modes",
    "spoken",
    "state_kept",
    "swap_",
    "trace",
    "untouched",
    "unwrapped",
    "widen_",
]
