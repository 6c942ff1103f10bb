"""The quantizer that transformers calls while it loads and saves."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.quantizers.base import HfQuantizer

import bgd_plugin as bgd
from bgd_plugin import integration
from bgd_plugin.integration import CheckpointError, PQModule
from bgd_plugin_adapters.transformers.config import QUANT_METHOD, BGDQuantizationConfig, parts_of
from bgd_plugin_adapters.transformers.files import checked_files, checksum, packed_lengths, packed_state
from bgd_plugin_adapters.transformers.layout import layout_in, renamings_for
from bgd_plugin_adapters.transformers.loading import PackedTensors
from bgd_plugin_adapters.transformers.resuming import accept_packed_codes
from bgd_plugin_adapters.transformers.ties import forget_names, remember_names, share_, shared
from bgd_plugin_adapters.transformers.weights import compute_weights_, loose_weights_

__all__ = ["BGDHfQuantizer"]


class BGDHfQuantizer(HfQuantizer):
    """Loads quantized folders, and quantizes float ones without data.

    The quantized layers are inserted before the model's tensors are loaded, and stay, so that code which looks at the
    layers during initialization, and hooks registered on them, see the final layers.

    Attributes:
        quantization_config: the settings, and the model's quantized layers.
    """

    requires_calibration = False
    quantization_config: BGDQuantizationConfig

    def __init__(self, quantization_config: BGDQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # a copy, because this model's layers are added
        self._places: dict[str, tuple[str, ...]] = {}
        self._tied: dict[str, str] = {}
        self._loading: list[PQModule] = []
        self._given: Mapping[str, Any] | None = None

    @property
    def is_trainable(self) -> bool:
        """Gradients reach the codebooks."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Codebooks are parameters like any other, so `Trainer` needs no adapter on top."""
        return True

    def is_serializable(self) -> bool:
        """Quantized models can be saved."""
        return True

    def attach_(self, model: Any) -> None:
        """Mark a model as quantized for transformers, with this quantizer."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        self.postprocess_model(model)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """Replace transformers' `weight_conversions`: names in a folder are the saved model's, and may be renamed."""
        return [*renamings_for(model), PackedTensors(self._places)] if self.pre_quantized else weight_conversions

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not self.pre_quantized:
            return
        config = self.quantization_config
        if not config.layers:
            raise CheckpointError("quantization_config in config.json names no layers: it is damaged")
        files = checkpoint_files or ()
        if files:
            stored = {path: sizes for path, sizes in config.layers.items() if path not in config.tied}
            checked_files(files, stored, config.checksum)
        layout = layout_in(model, config, packed_lengths(files))
        integration.make_room_(model, layout.placement)
        self._places = layout.names
        self._tied = layout.shared | forget_names(model)
        self._loading = [module for module in model.modules() if isinstance(module, PQModule)]
        loose_weights_(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model._weight_conversions = []  # saved tensors keep the model's own names
        if not self.pre_quantized:
            self._quantize_(model)
        compute_weights_(model)
        _reset_new_biases(self._loading)
        share_(model, self._tied)
        if self._loading:  # a folder, no model that was quantized in memory
            integration.narrow_(model)
        self._loading = []
        forget_names(model)
        accept_packed_codes(model)
        self._write_layers(model)

    def remove_quantization_config(self, model: Any) -> None:
        """Remove the quantization config from the model's config, and from the configs of its parts."""
        super().remove_quantization_config(model)
        for part in parts_of(model.config):
            vars(part).pop("quantization_config", None)

    def _quantize_(self, model: Any) -> None:
        settings = self.quantization_config.settings_for(model)
        result = bgd.quantize_weights(model, settings)
        integration.transplant_(model, result.model)
        self.quantization_config.original_bytes = result.report.original_bytes
        self.pre_quantized = True

    def _write_layers(self, model: Any) -> None:
        """Write the layers to the config, for `config.json`; all but the checksum."""
        own = self.quantization_config
        modules = {path: m for path, m in model.named_modules() if isinstance(m, PQModule)}
        own.layers = {**integration.placement_of(model)}
        own.shapes = {path: tuple(module.weight_shape) for path, module in modules.items()}
        own.tied = shared(model)
        for part in parts_of(model.config):  # a tower is loaded by its own config alone
            part.quantization_config = own

    @contextmanager
    def saving(self, model: Any, state_dict: Mapping[str, Any] | None) -> Iterator[None]:
        """While `save_pretrained` runs, keep the state dict that it was given, and let it leave nothing out.

        A class may exclude parameters that it computes when it is built, such as Marian's positions. In a quantized
        model they are rounded to half precision, so the folder must hold them.

        Args:
            model: the model being saved.
            state_dict: its tensors, if not all of its own state.
        """
        self._given = state_dict
        left_out, model._keys_to_ignore_on_save = model._keys_to_ignore_on_save, set()
        try:
            yield
        finally:
            self._given = None
            model._keys_to_ignore_on_save = left_out

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """The tensors of the model that `save_pretrained` writes; layers and checksum go to `config.json`."""
        state = packed_state(model, self._given)
        own = self.quantization_config
        self._write_layers(model)
        assert own.layers is not None
        if self._given is not None:
            own.layers = {p: s for p, s in own.layers.items() if not s or f"{own.tied.get(p, p)}.codebook" in state}
        own.checksum = checksum([path for path, sizes in own.layers.items() if sizes], state)
        return state, {"bgd_plugin_version": bgd.__version__}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """The same model with ordinary layers of decoded weights."""
        result: Any = bgd.materialize(model).to(dtype)
        remember_names(result)
        return result


@torch.no_grad()
def _reset_new_biases(layers: list[PQModule]) -> None:
    """Set biases that are not in the folder to zero, as transformers does for new layers."""
    for layer in layers:
        bias = getattr(layer, "bias", None)
        if bias is not None and not getattr(bias, "_is_hf_initialized", False):
            bias.zero_()
