"""Changes to transformers' own models for quantized layers, whichever way these were inserted.

`save_pretrained` asks a model's quantizer what to write. A model that was quantized by other means has none: its
folder would name no quantized layers, and load with random weights.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bgd_plugin import integration
from bgd_plugin.integration import ConfigError, NarrowModule, PQModule
from bgd_plugin_adapters.transformers.config import QUANT_METHOD, BGDQuantizationConfig, parts_of
from bgd_plugin_adapters.transformers.quantizer import BGDHfQuantizer
from bgd_plugin_adapters.transformers.ties import forget_names, remember_names

__all__ = ["register"]

_logger = logging.getLogger(__name__)


def register() -> None:
    """Make every transformers model save and resize quantized layers; a second call changes nothing."""
    if getattr(PreTrainedModel.save_pretrained, "knows_bgd", False):
        return
    save, resize = PreTrainedModel.save_pretrained, PreTrainedModel.resize_token_embeddings

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantizer = _quantizer_of(self)
        if quantizer is None:
            _forget_config(self)
            return save(self, *args, **kwargs)
        given = inspect.signature(save).bind(self, *args, **kwargs).arguments.get("state_dict")
        with quantizer.saving(self, given):
            return save(self, *args, **kwargs)

    @functools.wraps(resize)
    def resize_token_embeddings(self: Any, *args: Any, **kwargs: Any) -> Any:
        _make_embeddings_float_(self)
        return resize(self, *args, **kwargs)

    save_pretrained.knows_bgd = True  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
    PreTrainedModel.resize_token_embeddings = resize_token_embeddings


def _quantizer_of(model: Any) -> BGDHfQuantizer | None:
    """The quantizer of a model with quantized layers; a new one if it has none.

    Raises:
        ConfigError: the model has another library's quantizer, or layers that a folder cannot restore.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not any(isinstance(module, PQModule) for module in model.modules()):
        return None
    if isinstance(quantizer, BGDHfQuantizer):
        return quantizer
    if hasattr(PreTrainedModel, "_modelopt_cache") and hasattr(model, "_modelopt_state"):
        return None  # ModelOpt saves such models itself (mto.enable_huggingface_checkpointing), and restores our layers
    if quantizer is not None:
        raise ConfigError(
            f"the model has layers that bgd_plugin quantized, and {type(quantizer).__name__} would save it: its folder "
            "could not be loaded; quantize with BGDQuantizationConfig or quantize_pretrained instead"
        )
    _require_loadable(model)
    made = BGDHfQuantizer(BGDQuantizationConfig(layers=integration.placement_of(model)))
    made.attach_(model)
    return made


def _forget_config(model: Any) -> None:
    """Take our config off a model without quantized layers, built from a quantized folder's config or made float.

    With it, the model's folder would be read as a quantized one.
    """
    if isinstance(getattr(model, "hf_quantizer", None), BGDHfQuantizer):
        model.hf_quantizer, model.is_quantized = None, False
        vars(model).pop("quantization_method", None)
        remember_names(model)
    for part in (model.config, *parts_of(model.config)):
        found = getattr(part, "quantization_config", None)
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        if method == QUANT_METHOD:
            del part.quantization_config


def _require_loadable(model: Any) -> None:
    """Refuse a model that cannot be rebuilt from its class, its config and the sizes of its layers."""
    try:
        with torch.device("meta"):
            skeleton: nn.Module = type(model)(model.config)
        integration.make_room_(skeleton, integration.placement_of(model))
    except Exception as error:  # building a model runs its own code
        raise ConfigError(f"the quantized model cannot be saved as a folder that loads: {error}") from error
    other = set(skeleton.state_dict()) ^ set(model.state_dict())
    if other:
        names = ", ".join(sorted(other)[:4])
        raise ConfigError(
            f"the quantized model cannot be saved as a folder that loads: it differs from a {type(model).__name__} of "
            f"its config in {names}; save it with bgd_plugin.save"
        )


def _make_embeddings_float_(model: Any) -> None:
    """Decode quantized token embeddings and the head, so that rows can be added and removed."""
    is_narrow = any(isinstance(module, NarrowModule) for module in model.modules())
    integration.widen_(model)
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    tables = {id(module.codebook) for module in both if isinstance(module, PQModule)}
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PQModule)}
    paths = [path for path, module in layers.items() if id(module.codebook) in tables]
    if paths:
        _logger.warning("%s: decoded for resizing, float from now on", ", ".join(paths))
        integration.materialize_(model, paths)
    if paths or is_narrow:
        remember_names(model)
        forget_names(model)
