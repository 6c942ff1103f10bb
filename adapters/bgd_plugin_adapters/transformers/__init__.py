"""Hugging Face transformers: `from_pretrained(quantization_config=)` and `quantize_pretrained(model, calibration)`.

A quantized model keeps its class: it generates, saves and loads as every transformers model.
"""

from __future__ import annotations

from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from bgd_plugin_adapters.transformers import hosting
from bgd_plugin_adapters.transformers.calibrated import QuantizedPretrained, quantize_pretrained
from bgd_plugin_adapters.transformers.card import model_card_section, save_pretrained
from bgd_plugin_adapters.transformers.config import QUANT_METHOD, BGDQuantizationConfig
from bgd_plugin_adapters.transformers.lora import on_quantized_layers
from bgd_plugin_adapters.transformers.quantizer import BGDHfQuantizer

__all__ = [
    "BGDHfQuantizer",
    "BGDQuantizationConfig",
    "QuantizedPretrained",
    "model_card_section",
    "on_quantized_layers",
    "quantize_pretrained",
    "register",
    "save_pretrained",
]


def register() -> None:
    """Register config and quantizer with transformers; a second call does nothing more."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = BGDQuantizationConfig
    AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = BGDHfQuantizer
    hosting.register()
