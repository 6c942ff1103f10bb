"""Save a quantized network to a folder.

| file | holds |
|---|---|
| `qconfig.json` | the config of each layer, as neural-compressor writes it |
| `quantized_weight.pt` | only the layers quantized by neural-compressor's own algorithms |
| `bgd.safetensors` | everything else, as `bgd_plugin.save` writes it |
| `bgd.json` | length and SHA-256 of the other files, to detect missing or edited ones |
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from neural_compressor.torch.utils.utility import QCONFIG_NAME, WEIGHT_NAME

import bgd_plugin as bgd
from bgd_plugin.integration import ConfigError
from bgd_plugin_adapters.neural_compressor.config import ALGORITHM, LOADED_BY
from bgd_plugin_adapters.neural_compressor.foreign import detached_state, without_foreign

__all__ = ["FORMAT", "MANIFEST", "NETWORK", "fingerprint", "save"]

NETWORK = "bgd.safetensors"
MANIFEST = "bgd.json"
FORMAT = 1
"""Version of the folder, in its manifest."""


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
    (folder / MANIFEST).unlink(missing_ok=True)  # without it the folder is not read; it is written last
    entries = {str(key): {config.name: dict(config.to_dict())} for key, config in model.qconfig.items()}
    for entry in entries.values():
        if ALGORITHM in entry:  # makes neural-compressor's own load, which would silently load nothing, fail
            entry[ALGORITHM]["loaded_by"] = LOADED_BY
    (folder / QCONFIG_NAME).write_text(json.dumps(entries, indent=4), encoding="utf-8")
    torch.save(detached_state(model), folder / WEIGHT_NAME)
    bgd.save(without_foreign(model), folder / NETWORK)
    manifest = {
        "format": FORMAT,
        "bgd_plugin": bgd.__version__,
        "neural_compressor": _version(),
        "files": {name: fingerprint(folder / name) for name in (QCONFIG_NAME, WEIGHT_NAME, NETWORK)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=4), encoding="utf-8")


def _version() -> str:
    for name in ("neural-compressor-pt", "neural-compressor"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown"


def fingerprint(file: Path) -> dict[str, Any]:
    """A file's length and SHA-256, as the manifest has them."""
    content = file.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
