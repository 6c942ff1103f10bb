"""Product-quantized modules: they hold a codebook and codes, and decode the weight in `forward`."""

from bgd_plugin.nn.base import PQModule, storable
from bgd_plugin.nn.conv import PQConv1d, PQConv2d, PQConv3d
from bgd_plugin.nn.conv_transpose import PQConvTranspose1d, PQConvTranspose2d, PQConvTranspose3d
from bgd_plugin.nn.convert import materialized, quantized, restored_parameter
from bgd_plugin.nn.embedding import PQEmbedding
from bgd_plugin.nn.frozen import FrozenNorm, freeze_norms_
from bgd_plugin.nn.hooks import take_hooks_
from bgd_plugin.nn.linear import PQLinear
from bgd_plugin.nn.narrow import NarrowEmbedding, NarrowLinear, NarrowModule, narrowed, widened
from bgd_plugin.nn.norms import has_running_statistics, is_batchnorm, normalizes
from bgd_plugin.nn.padding import SamePadding
from bgd_plugin.nn.rotated_norm import RotatedNorm
from bgd_plugin.nn.weight import FloatWeight, PQWeight

__all__ = [
    "FloatWeight",
    "FrozenNorm",
    "NarrowEmbedding",
    "NarrowLinear",
    "NarrowModule",
    "PQConv1d",
    "PQConv2d",
    "PQConv3d",
    "PQConvTranspose1d",
    "PQConvTranspose2d",
    "PQConvTranspose3d",
    "PQEmbedding",
    "PQLinear",
    "PQModule",
    "PQWeight",
    "RotatedNorm",
    "SamePadding",
    "freeze_norms_",
    "has_running_statistics",
    "is_batchnorm",
    "materialized",
    "narrowed",
    "normalizes",
    "quantized",
    "restored_parameter",
    "storable",
    "take_hooks_",
    "widened",
]
