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

    The quantized layers stand in the model before its tensors are loaded, and stay: a model that looks at its layers
    while it is built or initialized, and hooks that are put on them, meet what they will meet later.
    """

    requires_calibration = False
    quantization_config: BGDQuantizationConfig

    def __init__(self, quantization_config: BGDQuantizationConfig, **kwargs: Any) -> None:
        super().__init__(copy.copy(quantization_config), **kwargs)  # what is written below is of one model
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
        return True

    def attach_(self, model: Any) -> None:
        """Make a model known to transformers as quantized."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = QUANT_METHOD
        self.postprocess_model(model)

    def update_weight_conversions(self, weight_conversions: Any, model: Any) -> Any:
        """A folder of ours holds names of the model that was saved: a model of another class renames them."""
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
        self._tied = forget_names(model)
        self._loading = [module for module in model.modules() if isinstance(module, PQModule)]
        loose_weights_(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        model._weight_conversions = []  # what is saved keeps the model's own names
        if not self.pre_quantized:
            self._quantize_(model)
        compute_weights_(model)
        _reset_new_biases(self._loading)
        self._loading = []
        share_(model, self._tied)
        forget_names(model)
        accept_packed_codes(model)
        self._write_layers(model)

    def remove_quantization_config(self, model: Any) -> None:
        """As transformers does, in the configs of parts, too."""
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
        """What `config.json` will say of the layers, all but the checksum."""
        own = self.quantization_config
        modules = {path: m for path, m in model.named_modules() if isinstance(m, PQModule)}
        own.layers = {**integration.placement_of(model)}
        own.shapes = {path: tuple(module.weight_shape) for path, module in modules.items()}
        own.tied = shared(model)
        for part in parts_of(model.config):  # a tower is loaded by its own config alone
            part.quantization_config = own

    @contextmanager
    def saving(self, state_dict: Mapping[str, Any] | None) -> Iterator[None]:
        """While `save_pretrained` runs: the state dict that it was given."""
        self._given = state_dict
        try:
            yield
        finally:
            self._given = None

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What `save_pretrained` writes; the layers and the checksum go to `config.json`."""
        state = packed_state(model, self._given)
        own = self.quantization_config
        self._write_layers(model)
        assert own.layers is not None
        if self._given is not None:
            own.layers = {p: s for p, s in own.layers.items() if not s or f"{own.tied.get(p, p)}.codebook" in state}
        own.checksum = checksum([path for path, sizes in own.layers.items() if sizes], state)
        return state, {"bgd_plugin_version": bgd.__version__}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """The same model with ordinary layers, which compute the same."""
        result: Any = bgd.materialize(model).to(dtype)
        remember_names(result)
        return result


@torch.no_grad()
def _reset_new_biases(layers: list[PQModule]) -> None:
    """A bias that the folder does not hold is zero, as transformers makes the biases of new layers."""
    for layer in layers:
        bias = getattr(layer, "bias", None)
        if bias is not None and not getattr(bias, "_is_hf_initialized", False):
            bias.zero_()
