"""Quantization with calibration data, which `from_pretrained` does not have."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, integration
from bgd_plugin.integration import ConfigError, Report
from bgd_plugin_adapters.transformers.config import BGDQuantizationConfig
from bgd_plugin_adapters.transformers.quantizer import BGDHfQuantizer

__all__ = ["QuantizedPretrained", "quantize_pretrained"]


@dataclass(frozen=True)
class QuantizedPretrained:
    """The result of `quantize_pretrained`.

    Attributes:
        model: the quantized model, of the float model's class.
        report: of `bgd_plugin.quantize`.
    """

    model: Any
    report: Report


def quantize_pretrained(
    model: PreTrainedModel,
    calibration: Iterable[Any] | None,
    config: BGDQuantizationConfig | BGDConfig | None = None,
    **options: Any,
) -> QuantizedPretrained:
    """Compress a transformers model, preserving its layers' outputs on real inputs.

    Args:
        model: the float model; it is not changed.
        calibration: batches from a tokenizer or an image processor: mappings of the model's keyword arguments.
            None: each weight is fitted separately, as `from_pretrained(quantization_config=)` does.
        config: what to quantize and how.
        **options: of `bgd_plugin.quantize`: `teacher`, `forward`, `checkpoint`, `progress`.

    Returns:
        a model of the same class, for `save_pretrained`, and the report of `bgd_plugin.quantize`.

    Raises:
        ConfigError: the model is already quantized, or is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConfigError(f"model is a {type(model).__name__}: give a transformers model, or use bgd_plugin.quantize")
    before = getattr(model, "quantization_method", None)
    if getattr(model, "hf_quantizer", None) is not None:
        method = getattr(before, "value", before)
        raise ConfigError(f"the model is quantized already, by {method!r}: load it without quantization_config")
    written = config if isinstance(config, BGDQuantizationConfig) else BGDQuantizationConfig(config=config)
    settings = written.settings_for(model)
    if calibration is None:
        result = bgd.quantize_weights(model, settings, progress=options.get("progress", True))
    else:
        result = bgd.quantize(model, calibration, settings, **options)
    made: Any = result.model if type(result.model) is type(model) else integration.transplanted(model, result.model)
    own = BGDQuantizationConfig(
        written.modules_to_not_convert,
        config=written.config,
        layers=integration.placement_of(made),
        original_bytes=result.report.original_bytes,
    )
    BGDHfQuantizer(own).attach_(made)
    return QuantizedPretrained(made, result.report)
