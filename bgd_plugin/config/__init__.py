"""Settings for the network, for a layer, and for each training stage: frozen, and validated on creation."""

from bgd_plugin.config.given import given_config
from bgd_plugin.config.layer import BLOCK_SIZES, CODEBOOK_SIZE, FAMILIES, MAX_CODEBOOK_SIZE, LayerConfig
from bgd_plugin.config.network import DEFAULT_DIVERGENCE, BGDConfig
from bgd_plugin.config.training import DistillationConfig, FinetuningConfig, ReconstructionConfig

__all__ = [
    "BLOCK_SIZES",
    "CODEBOOK_SIZE",
    "DEFAULT_DIVERGENCE",
    "FAMILIES",
    "MAX_CODEBOOK_SIZE",
    "BGDConfig",
    "DistillationConfig",
    "FinetuningConfig",
    "LayerConfig",
    "ReconstructionConfig",
    "given_config",
]
