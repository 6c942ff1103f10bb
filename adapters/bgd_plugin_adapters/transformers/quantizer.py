"""The quantizer that transformers calls while it loads and saves."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

import bgd_plugin as bgd
from bgd_plugin import integration
from bgd_plugin.integration import (
    CheckpointError,
    ConfigError,
    PQModule,
    PQWeight,
    compute_parameter_,
    restore_parameter_,
)
from bgd_plugin_adapters.transformers.config import QUANT_METHOD, BGDQuantizationConfig
from bgd_plugin_adapters.transformers.files import (
    PackedLayer,
    checked_files,
    checksum,
    packed_state,
    unpacked_codes,
    unpacked_mask,
)

__all__ = ["BGDHfQuantizer"]


class BGDHfQuantizer(HfQuantizer):
    """Loads quantized folders, and quantizes float ones without data.

    A layer is loaded into a `PackedLayer`, which gives way to the real one as soon as its tensors are there.
    """

    requires_calibration = False
    quantization_config: BGDQuantizationConfig

    def __init__(self, quantization_config: BGDQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # what is written below is of one model
        self._waiting: dict[str, PQModule] = {}

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the codebooks."""
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse to leave weights on disk: a quantized layer is decoded from what is in memory."""
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise ConfigError("device_map leaves parts on disk, which quantized layers cannot do: take 'disk' out")

    def attach_(self, model: Any) -> None:
        """Make a model known to transformers as quantized."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        self.postprocess_model(model)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """A folder of ours holds the model's own names; nothing is to be renamed."""
        return [] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        layers = self.quantization_config.layers
        if not layers:
            raise CheckpointError("quantization_config in config.json names no layers: it is damaged")
        if checkpoint_files is not None:
            checked_files(checkpoint_files, layers, self.quantization_config.checksum)
        placement = _in_this_model(model, layers)
        integration.make_room_(model, placement)
        for path, module in list(model.named_modules(remove_duplicate=False)):
            if isinstance(module, PQModule):
                self._waiting[path] = module
                if isinstance(module, PQWeight):  # for transformers, a name is of a module or of a tensor
                    holder, name = _holder(model, path)
                    restore_parameter_(holder, name, nn.Parameter(module.codebook.new_empty(0)))
                    del holder._parameters[name]
                _put(model, path, PackedLayer(module))

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model._weight_conversions = []  # see update_weight_conversions: what is saved keeps the model's own names
        if not self.pre_quantized:
            self._quantize_(model)
        for path, layer in self._waiting.items():
            self._finish_(model, path, layer)
        self._waiting = {}

    def _finish_(self, model: nn.Module, path: str, layer: PQModule) -> None:
        """Put the real layer in the place of the one that was loaded."""
        loaded: Any = model.get_submodule(path)
        if isinstance(loaded, PQModule):  # a layer that hangs at two paths
            return
        layer.codebook = loaded.codebook
        layer._buffers["mask"] = None if loaded.mask is None else unpacked_mask(layer, loaded.mask)
        if not isinstance(layer, PQWeight):
            layer._buffers["codes"] = unpacked_codes(path, layer, loaded.weight)
            layer.bias = loaded.bias
            _put(model, path, layer.train(loaded.training))
            return
        layer._buffers["codes"] = unpacked_codes(path, layer, loaded.codes)
        holder, name = _holder(model, path)
        del holder._modules[name]
        holder.register_parameter(name, nn.Parameter(layer.codebook.new_empty(0)))
        compute_parameter_(holder, name, layer)

    def _quantize_(self, model: Any) -> None:
        settings = self.quantization_config.settings_for(model)
        result = bgd.quantize_weights(model, settings)
        integration.transplant_(model, result.model)
        self.quantization_config.layers = {**integration.placement_of(model)}
        self.quantization_config.original_bytes = result.report.original_bytes
        self.pre_quantized = True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the layers and the checksum go to `config.json`."""
        state = packed_state(model)
        own = self.quantization_config
        layers = integration.placement_of(model)
        own.layers = {**layers}
        own.checksum = checksum([path for path, sizes in layers.items() if sizes], state)
        return state, {"bgd_plugin_version": bgd.__version__}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """The same model with ordinary layers, which compute the same."""
        return bgd.materialize(model).to(dtype)


def is_batchnorm(module: nn.Module) -> bool:
    """Whether a frozen norm may stand in a module's place."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    holder, name = _holder(model, path)
    holder._modules[name] = module


def _holder(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds what stands at a path, and the name in it."""
    owner, _, name = path.rpartition(".")
    return model.get_submodule(owner), name


def _in_this_model(model: Any, layers: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """The layers by their paths in this model: a base model lacks its prefix, and heads of other tasks are left out."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    known = set(integration.layers_in(model)[0]) | {
        path for path, module in model.named_modules() if is_batchnorm(module)
    }
    placement = {}
    for path, sizes in layers.items():
        candidates = (path, f"{prefix}{path}", path.removeprefix(prefix))
        place = next((candidate for candidate in candidates if candidate in known), None)
        if place is not None:
            placement[place] = sizes
        elif not prefix or path.startswith(prefix):
            raise CheckpointError(f"layer {path!r} of the folder is no layer of {type(model).__name__}")
    return placement
