"""Quantization that loses next to nothing, so that outputs can be compared."""

from __future__ import annotations

from typing import Any

from torch import nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from tests.networks import em

__all__ = ["FINE", "quantize_finely"]


FINE = LayerConfig(block_size=1, codebook_size=256)


def quantize_finely(
    model: nn.Module, data: Any, config: bgd.BGDConfig | None = None, **options: Any
) -> bgd.results.Quantized:
    return bgd.quantize(model, data, config or em(), progress=False, **options)
