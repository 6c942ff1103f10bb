"""The settings of the paper's own experiments.

**Source**: arXiv 1907.05686, sections 4.1 and 4.4, table 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bgd_plugin.config.layer import BLOCK_SIZES, LayerConfig
from bgd_plugin.config.training import DistillationConfig, FinetuningConfig

__all__ = ["opened", "paper_settings"]

# In torchvision's Mask R-CNN: layers that the paper keeps float besides the first, and outputs that it distills.
_MASK_RCNN_FLOAT = ("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits")
_MASK_RCNN_OUTPUTS = ("backbone", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor")


def paper_settings(
    regime: str, codebook_size: int, fc_codebook_size: int | None, pointwise_block_size: int | None
) -> dict[str, Any]:
    """The paper's settings, as fields of `BGDConfig`.

    Args:
        regime: "small", "large" or "mask_rcnn".
        codebook_size, fc_codebook_size, pointwise_block_size: as in `BGDConfig.paper`.
    """
    small, detects = regime == "small", regime == "mask_rcnn"
    fc_codebook_size = fc_codebook_size or (256 if detects else 2048)
    pointwise = pointwise_block_size if pointwise_block_size is not None else (4 if small else 8)
    settings: dict[str, Any] = {
        "method": "em",
        "conv": LayerConfig(block_size=9 if small else 18, codebook_size=codebook_size),
        "pointwise_conv": LayerConfig(block_size=pointwise, codebook_size=codebook_size),
        "linear": LayerConfig(block_size=4, codebook_size=fc_codebook_size),
        "rotation": False,
        "max_divergence": None,
        "batchnorm": "keep",
        "kept_aside": 0.0,
        "codebook_storage": "float16",
        "weight_storage": "float32",
        "float_storage": "float32",
        "distillation": DistillationConfig(),
        "finetuning": FinetuningConfig(epochs=9, trained="codebooks"),
    }
    if detects:
        settings |= {
            "overrides": tuple((name, None) for name in _MASK_RCNN_FLOAT),
            "float_storage": "float16",
            "distillation": None,
            "finetuning": FinetuningConfig(epochs=9, trained="codebooks", outputs=_MASK_RCNN_OUTPUTS),
        }
    return settings


def opened(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's settings for a budget, which chooses the sizes that are those of the default.

    Args:
        settings: fields of `BGDConfig`.
    """
    defaults = {kind: LayerConfig(block_size=BLOCK_SIZES[kind]) for kind in ("conv", "pointwise_conv", "linear")}
    return {
        name: LayerConfig() if name in defaults and value == defaults[name] else value
        for name, value in settings.items()
    }
