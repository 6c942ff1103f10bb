"""peft's LoRA on quantized linear layers, as a custom module of a `LoraConfig`."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from bgd_plugin.integration import ConfigError, NarrowLinear, NarrowModule, PQLinear, PQModule

__all__ = ["on_quantized_layers"]

# Other initializations move a part of the weight into the adapter, and write the rest back into the weight.
_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")


def on_quantized_layers(config: Any) -> Any:
    """Make a `peft.LoraConfig` put its adapters on quantized linear layers, too; returns the config.

    peft does not store this in a folder: pass the config as `config=` to `PeftModel.from_pretrained` as well.

    Raises:
        ConfigError: an initialization of the adapters that would change the quantized weight.
    """
    _require_untouched(config)
    config._register_custom_module({PQLinear: _lora_class(), NarrowLinear: _lora_class()})
    return config


def _require_untouched(config: Any) -> None:
    how = config.init_lora_weights
    if not any(how is known or how == known for known in _INITIALIZATIONS):
        raise ConfigError(
            f"init_lora_weights={how!r} writes to the weights, and a quantized layer has none of its own: give one of "
            f"{', '.join(map(repr, _INITIALIZATIONS))}"
        )


@functools.cache
def _lora_class() -> Any:
    """The class, created at first use, because peft may not be installed."""
    from peft.tuners.lora.layer import Linear

    class LoraPQLinear(Linear):
        """An adapter beside a quantized layer, which it never changes."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            _require_untouched(kwargs["config"])
            with warnings.catch_warnings():  # "Unsupported layer type", of every custom module
                warnings.simplefilter("ignore", UserWarning)
                super().__init__(*args, **kwargs)

        def merge(self, *args: Any, **kwargs: Any) -> None:
            """Refuse: the sum of the weight and an adapter has no codes.

            Raises:
                ConfigError: the layer is still quantized.
            """
            if isinstance(self.get_base_layer(), (PQModule, NarrowModule)):
                raise ConfigError(
                    "an adapter cannot be merged into a quantized layer, whose weight is decoded from codes: keep it "
                    "beside the layer, or make the model float first (bgd_plugin.materialize)"
                )
            super().merge(*args, **kwargs)

    return LoraPQLinear
