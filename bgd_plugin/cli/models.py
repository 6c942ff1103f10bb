"""Build a network from the name given on the command line.

Names are `torchvision:resnet18`, `timm:NAME`, `transformers:PATH`, or `package.module:callable`. A framework is
imported only if a name needs it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from bgd_plugin.errors import BGDError, CheckpointError, ConfigError

__all__ = ["NamedModel", "named_model", "network_on"]

_FORMS = "torchvision:NAME, timm:NAME, transformers:PATH or package.module:callable"
# Keys under which training scripts save the state dict.
_STATE_KEYS = ("state_dict", "model", "model_state_dict")
# Prefixes that wrappers add to every key.
_PREFIXES = ("module.", "_orig_mod.")


@dataclass(frozen=True, kw_only=True)
class NamedModel:
    """A network built from its name.

    Attributes:
        model: the network, in evaluation mode.
        transform: the preprocessing (PIL image to tensor) that belongs to the weights, or None.
        has_weights: False if the weights are known to be random.
    """

    model: nn.Module
    transform: Callable[[Any], Tensor] | None = None
    has_weights: bool = True


def named_model(name: str, weights: str | None = None, *, only_shapes: bool = False) -> NamedModel:
    """Build the network with this name.

    Args:
        name: one of the forms above. A `callable` is called without arguments and returns a module.
        weights: a file with a state dict (safetensors, or written by `torch.save`), or a name of pretrained weights
            of the framework, such as `DEFAULT`; these may be downloaded.
        only_shapes: the weights are not needed, so the network may be on the meta device.

    Raises:
        ConfigError: an unknown form of name, network or name of weights.
        BGDError: a package is missing, or it cannot build the network.
        CheckpointError: a file of weights is not a state dict, or does not fit.
    """
    kind, _, rest = name.partition(":")
    if not kind or not rest:
        raise ConfigError(f"model {name!r}: give {_FORMS}")
    own_weights = None if weights is None or Path(weights).is_file() else weights
    if own_weights and (Path(own_weights).suffix or os.sep in own_weights):
        raise ConfigError(f"weights {own_weights!r}: file not found")
    with torch.random.fork_rng(devices=[]):  # random weights are the same at each call
        torch.manual_seed(0)
        found = _built(name, weights, own_weights, only_shapes=only_shapes)
    if weights is not None and own_weights is None:
        _load_state_(found.model, Path(weights))
        found = NamedModel(model=found.model)
    found.model.eval()
    return found


def _built(name: str, weights: str | None, own_weights: str | None, *, only_shapes: bool) -> NamedModel:
    """The network, with the framework's pretrained weights of the name `own_weights` if there are any."""
    kind, _, rest = name.partition(":")
    build = {"torchvision": _torchvision, "timm": _timm, "transformers": _transformers}.get(kind)
    if build:
        return build(rest, own_weights, only_shapes and weights is None)
    if own_weights:
        raise ConfigError(f"weights {own_weights!r}: file not found, and {name!r} has no weights by name")
    return NamedModel(model=_called(kind, rest))


def _torchvision(name: str, weights: str | None, only_shapes: bool) -> NamedModel:
    models = _imported("torchvision.models", "vision")
    if name not in models.list_models():
        raise ConfigError(f"torchvision has no model {name!r}; it has {_near(name, models.list_models())}")
    if weights is None:
        with torch.device("meta" if only_shapes else "cpu"):
            return NamedModel(model=models.get_model(name, weights=None), has_weights=False)
    known = models.get_model_weights(name)
    if weights not in known.__members__ and weights != "DEFAULT":
        raise ConfigError(f"{name!r} has no weights {weights!r}; it has DEFAULT, {', '.join(known.__members__)}")
    chosen = known[weights]
    try:
        return NamedModel(model=models.get_model(name, weights=chosen), transform=chosen.transforms())
    except OSError as error:
        raise BGDError(
            f"weights {weights!r} of {name!r} cannot be downloaded ({error}): give --weights a local file"
        ) from error


def _timm(name: str, weights: str | None, only_shapes: bool) -> NamedModel:
    timm = _imported("timm", None)
    if weights not in (None, "DEFAULT"):
        raise ConfigError(f"weights {weights!r}: for timm models give DEFAULT or a file")
    try:
        model = timm.create_model(name, pretrained=weights == "DEFAULT")
    except (RuntimeError, OSError) as error:
        raise BGDError(f"timm model {name!r}: {error}") from error
    config = timm.data.resolve_model_data_config(model)
    return NamedModel(
        model=model, transform=timm.data.create_transform(**config, is_training=False), has_weights=weights is not None
    )


def _transformers(path: str, weights: str | None, only_shapes: bool) -> NamedModel:
    transformers = _imported("transformers", None)
    if weights not in (None, "DEFAULT"):
        raise ConfigError(
            f"weights {weights!r}: transformers models have their weights in their folder: leave --weights out"
        )
    try:
        return NamedModel(model=transformers.AutoModelForImageClassification.from_pretrained(path))
    except (OSError, ValueError) as error:
        raise BGDError(f"transformers model {path!r}: {' '.join(str(error).split())}") from error


def _called(module_name: str, path: str) -> nn.Module:
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())  # like `python -m`; a console script does not search the current folder
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"model '{module_name}:{path}': {error}; give {_FORMS}") from error
    for atom in path.split("."):
        if not hasattr(value, atom):
            raise ConfigError(f"model '{module_name}:{path}': {module_name} has no {path!r}")
        value = getattr(value, atom)
    if not isinstance(value, nn.Module):
        value = value() if callable(value) else value
    if not isinstance(value, nn.Module):
        raise ConfigError(
            f"model '{module_name}:{path}' is a {type(value).__name__}: give a callable that returns a torch module"
        )
    return value


def _imported(name: str, extra: str | None) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        wanted = f"'bgd-plugin[{extra}]'" if extra else package
        raise BGDError(f"{package} cannot be imported ({error}): pip install {wanted}") from error


def _near(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or sorted(known)[:5]
    return f"{', '.join(near)} and {len(known) - len(near)} more"


def _load_state_(model: nn.Module, path: Path) -> None:
    """Load a state dict strictly.

    Raises:
        CheckpointError: the file is not a state dict, or does not fit the network.
    """
    state = _state_dict(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit the network: {' '.join(str(error).split())[:1000]}") from error


def _state_dict(path: Path) -> dict[str, Tensor]:
    import pickle

    import safetensors
    import safetensors.torch

    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (safetensors.SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is not a plain state dict: {str(error).splitlines()[0]}") from error
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(k, str) for k in content):
        raise CheckpointError(f"{path} contains a {type(content).__name__}: give a state dict")
    for prefix in _PREFIXES:
        if content and all(k.startswith(prefix) for k in content):
            content = {k.removeprefix(prefix): v for k, v in content.items()}
    return dict(content)


def network_on(name: str, weights: str | None, device: str, *, weights_matter: bool = True) -> NamedModel:
    """The network of that name, on a device; says so if its weights are random.

    Args:
        weights_matter: whether random weights are worth a message.

    Raises:
        ConfigError: a device that is not there.
    """
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device!r}: give cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch found no GPU: leave the option out")
    found = named_model(name, weights)
    if weights_matter and not found.has_weights:
        typer.echo(
            f"bgd-plugin: {name} has random weights: give --weights FILE or --weights DEFAULT for trained ones",
            err=True,
        )
    found.model.to(place)
    return found
