"""The way into each framework: a network, batches and the core's settings go in, a quantized network comes out."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig

__all__ = ["ENTRANCES", "Entrance", "same_state"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entrance:
    """How a framework's user quantizes and saves.

    Attributes:
        module: of the framework, by which it is seen whether it is there.
        quantize: `(model, batches, config)`; the model may be changed, the result is what is to be used.
        save: `(model, folder)` writes the framework's own files.
    """

    module: str
    quantize: Callable[[Any, Sequence[Any], BGDConfig], Any]
    save: Callable[[Any, Path], None]

    @property
    def missing(self) -> str | None:
        """Why the entrance cannot be used here, or None."""
        found = importlib.util.find_spec(self.module.split(".")[0])
        return None if found else f"{self.module} is not installed"


def _fields(config: BGDConfig) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _feed(batches: Sequence[Tensor]) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        for batch in batches:
            model(batch)

    return run


def _neural_compressor(model: nn.Module, batches: Sequence[Tensor], config: BGDConfig) -> Any:
    from neural_compressor.torch.quantization import quantize

    adapter = bgd.load_adapter("neural_compressor")
    return quantize(model, adapter.BGDConfig(**_fields(config)), run_fn=_feed(batches))


def _save_neural_compressor(model: Any, folder: Path) -> None:
    from neural_compressor.torch.quantization import save

    save(model, str(folder))


def _modelopt(model: nn.Module, batches: Sequence[Tensor], config: BGDConfig) -> Any:
    return bgd.load_adapter("modelopt").quantize(model, config, _feed(batches))


def _save_modelopt(model: Any, folder: Path) -> None:
    import modelopt.torch.opt as mto

    mto.save(model, folder / "model.pt")


def _torchao(model: nn.Module, batches: Sequence[Tensor], config: BGDConfig) -> Any:
    adapter = bgd.load_adapter("torchao")
    fields = _fields(config)
    fields.pop("overrides")  # torchao has names of its own

    def any_layer(module: nn.Module, name: str) -> bool:
        return isinstance(module, (nn.Conv2d, nn.Linear))

    settings = adapter.BGDWeightOnlyConfig(**fields)
    adapter.quantize_(model, settings, any_layer, calibration=batches, progress=False)
    return model


def _save_torchao(model: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "model.pt")


def _transformers(model: Any, batches: Sequence[Any], config: BGDConfig) -> Any:
    adapter = bgd.load_adapter("transformers")
    return adapter.quantize_pretrained(model, batches, config, progress=False).model


def _save_transformers(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


ENTRANCES = {
    "neural_compressor": Entrance(
        module="neural_compressor", quantize=_neural_compressor, save=_save_neural_compressor
    ),
    "modelopt": Entrance(module="modelopt", quantize=_modelopt, save=_save_modelopt),
    "torchao": Entrance(module="torchao", quantize=_torchao, save=_save_torchao),
    "transformers": Entrance(module="transformers", quantize=_transformers, save=_save_transformers),
}


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks hold the same tensors, bit for bit: codes, codebooks, norms and all that is float."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        value.dtype == second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )
