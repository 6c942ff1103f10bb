"""Settings: of the network, of a layer, of each stage of training; frozen, and checked where they are made."""

from bgd_plugin.config.layer import MAX_CODEBOOK_SIZE, LayerConfig
from bgd_plugin.config.network import FAMILIES, BGDConfig
from bgd_plugin.config.training import DistillationConfig, FinetuningConfig, ReconstructionConfig

__all__ = [
    "FAMILIES",
    "MAX_CODEBOOK_SIZE",
    "BGDConfig",
    "DistillationConfig",
    "FinetuningConfig",
    "LayerConfig",
    "ReconstructionConfig",
]
