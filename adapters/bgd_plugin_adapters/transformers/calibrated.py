"""Quantization with calibration data: what `from_pretrained` cannot do, since it is given none."""

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
    """What `quantize_pretrained` returns."""

    model: Any
    report: Report


def quantize_pretrained(
    model: PreTrainedModel,
    calibration: Iterable[Any] | None,
    config: BGDQuantizationConfig | BGDConfig | None = None,
    **options: Any,
) -> QuantizedPretrained:
    """Compress a transformers model, keeping what its layers compute on real inputs.

    Args:
        model: the float model; it is left untouched.
        calibration: batches as a tokenizer or an image processor gives them: mappings of the model's keyword arguments.
            None: each weight is fitted by itself, as `from_pretrained(quantization_config=)` does.
        config: what to quantize and how.
        **options: of `bgd_plugin.quantize`: `teacher`, `forward`, `checkpoint`, `progress`.

    Returns:
        a model of the same class, for `save_pretrained`, and the report of `bgd_plugin.quantize`.

    Raises:
        ConfigError: the model is quantized already, or is no transformers model.
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
        result = bgd.quantize_weights(model, settings)
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
