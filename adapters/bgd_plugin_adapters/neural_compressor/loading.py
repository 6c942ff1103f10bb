"""Load a quantized network from the folder that `saving` describes."""

from __future__ import annotations

import ast
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neural_compressor.common.base_config import config_registry
from neural_compressor.torch.quantization import load as neural_compressor_load
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME
from neural_compressor.torch.utils.utility import QCONFIG_NAME, WEIGHT_NAME
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.integration import CheckpointError, ConfigError
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM
from bgd_plugin_adapters.neural_compressor.foreign import (
    foreign_layers,
    restored,
    traced,
    without_foreign,
)
from bgd_plugin_adapters.neural_compressor.model import as_quantized_
from bgd_plugin_adapters.neural_compressor.saving import FORMAT, MANIFEST, NETWORK, fingerprint

__all__ = ["load"]


def load(
    model_name_or_path: str | None = None,
    original_model: nn.Module | None = None,
    format: str = "default",
    device: str = "cpu",
    *,
    checkpoint_dir: str | None = None,
    **kwargs: Any,
) -> Any:
    """Read a quantized network from a folder, with the arguments of neural-compressor's own `load`.

    That one supports only its own algorithms. It gets folders without a layer of ours, which are saved if `autotune`
    picks another algorithm, and models of the format "huggingface" that are not ours.

    Args:
        model_name_or_path: the folder.
        original_model: a network of the same architecture; it is not changed, and its weights are not used.
        format: "default", or "huggingface" for a model that neural-compressor reads itself.
        device: where the result goes.
        checkpoint_dir: older name of `model_name_or_path`.
        **kwargs: for neural-compressor's own `load`.

    Returns:
        the network in evaluation mode; its outputs are bit-identical to those of the saved one.

    Raises:
        CheckpointError: a file is missing, was edited, or does not fit `original_model`.
        ConfigError: no folder, no network, or a folder of ours with another `format`.
    """
    if (model_name_or_path is None) == (checkpoint_dir is None):
        raise ConfigError("load: give the folder, as model_name_or_path")
    folder = Path(str(model_name_or_path or checkpoint_dir)).expanduser()
    if getattr(format, "value", format) != "default":
        _require_not_ours(folder, format)
        return neural_compressor_load(str(model_name_or_path), original_model, format, device, **kwargs)
    if original_model is None:
        raise ConfigError("load: give original_model, a network of the same architecture")
    if _is_theirs(folder):
        their_model = copy.deepcopy(original_model)
        return neural_compressor_load(str(folder), original_model=their_model, device=device, **kwargs)
    _check_files(folder)
    mapping = _read_mapping(folder / QCONFIG_NAME)
    network = copy.deepcopy(original_model)
    if any(config.name != ALGORITHM and getattr(config, "dtype", "") != "fp32" for config in mapping.values()):
        network = _with_their_layers(folder, network)
    foreign = foreign_layers(network)
    like = without_foreign(traced(network))
    result = restored(bgd.load(folder / NETWORK, like=like), foreign)
    return as_quantized_(result, mapping, None).eval().to(device)


def _require_not_ours(folder: Path, format: Any) -> None:
    """Refuse to give a folder of ours to a reader that would fill its layers with random numbers."""
    if (folder / MANIFEST).exists():
        raise ConfigError(f"{folder} was saved in the format 'default': load it without format={format!r}")
    config = folder / "config.json"
    values = _parsed(config, json.loads) if config.is_file() else {}
    if isinstance(values, dict) and (values.get("quantization_config") or {}).get("quant_method") == ALGORITHM:
        raise ConfigError(
            f"{folder} is a transformers folder that bgd_plugin wrote: call load_adapter('transformers'), then "
            "from_pretrained"
        )


def _with_their_layers(folder: Path, network: nn.Module) -> nn.Module:
    """The network with the layers that neural-compressor's own algorithms quantized."""
    from neural_compressor.torch.algorithms import weight_only

    try:
        result: nn.Module = weight_only.load(str(folder), original_model=network)
    except Exception as error:  # their code raises many types of error on a damaged file
        raise CheckpointError(f"{folder / WEIGHT_NAME}: neural-compressor cannot load its layers ({error})") from error
    return result


def _is_theirs(folder: Path) -> bool:
    """Whether a folder was saved by neural-compressor itself: it has their two files, and no trace of ours."""
    if any((folder / name).exists() for name in (NETWORK, MANIFEST)):
        return False
    if not all((folder / name).is_file() for name in (QCONFIG_NAME, WEIGHT_NAME)):
        return False
    entries = _parsed(folder / QCONFIG_NAME, json.loads)
    return isinstance(entries, dict) and not any(ALGORITHM in entry for entry in entries.values())


def _check_files(folder: Path) -> None:
    names = (QCONFIG_NAME, WEIGHT_NAME, NETWORK, MANIFEST)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; a saved folder holds {', '.join(names)}")
    manifest = _parsed(folder / MANIFEST, json.loads)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{folder / MANIFEST} is damaged")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"{folder} is in format {manifest['format']}, this library reads up to {FORMAT}: upgrade bgd-plugin"
        )
    changed = [name for name in names[:3] if files.get(name) != fingerprint(folder / name)]
    if changed:
        raise CheckpointError(f"{folder}: {', '.join(changed)} was changed since it was saved: save the network again")


def _read_mapping(file: Path) -> dict[Any, Any]:
    """The config of each layer."""
    entries = _parsed(file, json.loads)
    try:
        return {ast.literal_eval(key): _config(*one) for key, entry in entries.items() for one in entry.items()}
    except (AttributeError, SyntaxError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error


def _config(name: str, values: dict[str, Any]) -> Any:
    """The config of one layer, of the algorithm of that name."""
    classes = config_registry.get_cls_configs()[FRAMEWORK_NAME]
    if name not in classes:
        raise CheckpointError(f"a layer was quantized by {name!r}, an algorithm that this neural-compressor lacks")
    values = {key: value for key, value in values.items() if key != "loaded_by"}
    return classes[name](**values, white_list=None) if name == ALGORITHM else classes[name](**values)


def _parsed(file: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error})") from error
