"""The folder of a quantized network.

| file | holds |
|---|---|
| `qconfig.json` | the config of each layer, as neural-compressor writes it |
| `quantized_weight.pt` | only the layers quantized by neural-compressor's own algorithms |
| `bgd.safetensors` | everything else, as `bgd_plugin.save` writes it |
| `bgd.json` | length and SHA-256 of the other files, to detect missing or edited ones |
"""

from __future__ import annotations

import ast
import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from neural_compressor.common.base_config import config_registry
from neural_compressor.torch.quantization import load as neural_compressor_load
from neural_compressor.torch.quantization.config import FRAMEWORK_NAME
from neural_compressor.torch.utils.utility import QCONFIG_NAME, WEIGHT_NAME
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.integration import CheckpointError, ConfigError
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM, LOADED_BY
from bgd_plugin_adapters.neural_compressor.foreign import (
    detached_state,
    foreign_layers,
    restored,
    traced,
    without_foreign,
)

__all__ = ["load", "save"]

_NETWORK = "bgd.safetensors"
_MANIFEST = "bgd.json"
_FORMAT = 1


def save(model: Any, checkpoint_dir: str = "saved_results", format: str = "default") -> None:
    """Write a quantized network to a folder; neural-compressor's `save` calls this.

    Args:
        model: the quantized network.
        checkpoint_dir: the folder; created if it does not exist.
        format: must be "default".

    Raises:
        ConfigError: a format other than "default".
    """
    if getattr(format, "value", format) != "default":
        raise ConfigError(
            f"format={format!r}: a network quantized by {ALGORITHM!r} is saved in the format 'default'; for a folder "
            "of transformers, use quantize_pretrained of the transformers adapter"
        )
    folder = Path(checkpoint_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MANIFEST).unlink(missing_ok=True)  # without it the folder is not read; it is written last
    entries = {str(key): {config.name: dict(config.to_dict())} for key, config in model.qconfig.items()}
    for entry in entries.values():
        if ALGORITHM in entry:  # makes neural-compressor's own load, which would silently load nothing, fail
            entry[ALGORITHM]["loaded_by"] = LOADED_BY
    (folder / QCONFIG_NAME).write_text(json.dumps(entries, indent=4), encoding="utf-8")
    torch.save(detached_state(model), folder / WEIGHT_NAME)
    bgd.save(without_foreign(model), folder / _NETWORK)
    manifest = {
        "format": _FORMAT,
        "bgd_plugin": bgd.__version__,
        "neural_compressor": _version(),
        "files": {name: _fingerprint(folder / name) for name in (QCONFIG_NAME, WEIGHT_NAME, _NETWORK)},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=4), encoding="utf-8")


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
    from bgd_plugin_adapters.neural_compressor.model import as_quantized_

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
    result = restored(bgd.load(folder / _NETWORK, like=like), foreign)
    return as_quantized_(result, mapping, None).eval().to(device)


def _require_not_ours(folder: Path, format: Any) -> None:
    """Refuse to give a folder of ours to a reader that would fill its layers with random numbers."""
    if (folder / _MANIFEST).exists():
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


def _version() -> str:
    for name in ("neural-compressor-pt", "neural-compressor"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def _fingerprint(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _is_theirs(folder: Path) -> bool:
    """Whether a folder was saved by neural-compressor itself: it has their two files, and no trace of ours."""
    if any((folder / name).exists() for name in (_NETWORK, _MANIFEST)):
        return False
    if not all((folder / name).is_file() for name in (QCONFIG_NAME, WEIGHT_NAME)):
        return False
    entries = _parsed(folder / QCONFIG_NAME, json.loads)
    return isinstance(entries, dict) and not any(ALGORITHM in entry for entry in entries.values())


def _check_files(folder: Path) -> None:
    names = (QCONFIG_NAME, WEIGHT_NAME, _NETWORK, _MANIFEST)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder}: {', '.join(missing)} missing; a saved folder holds {', '.join(names)}")
    manifest = _parsed(folder / _MANIFEST, json.loads)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or not isinstance(manifest.get("format"), int):
        raise CheckpointError(f"{folder / _MANIFEST} is damaged")
    if manifest["format"] > _FORMAT:
        raise CheckpointError(
            f"{folder} is in format {manifest['format']}, this library reads up to {_FORMAT}: upgrade bgd-plugin"
        )
    changed = [name for name in names[:3] if files.get(name) != _fingerprint(folder / name)]
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
