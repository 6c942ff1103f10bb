"""NVIDIA ModelOpt: the mode "bgd", which `mto.apply_mode` applies and `mto.save` and `mto.restore` know.

Settings are the fields of `BGDConfig`, in a dictionary that a pydantic class checks, as ModelOpt's configs are.
Calibration is a `forward_loop`, as everywhere in ModelOpt.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import glob
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import modelopt.torch.opt as mto
import torch
from modelopt.torch.opt.config import ModeloptBaseConfig, ModeloptField
from modelopt.torch.opt.dynamic import DynamicModule
from modelopt.torch.opt.mode import ModeDescriptor, _ModeRegistryCls
from pydantic import create_model
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig, integration
from bgd_plugin.integration import CheckpointError, ConfigError, PQModule

__all__ = ["BGDModeConfig", "BGDModeDescriptor", "BGDModeRegistry", "quantize", "register", "report"]

ForwardLoop = Callable[[nn.Module], Any] | Iterable[Any]

_DEFAULTS = BGDConfig().to_dict()

_create: Any = create_model  # its types do not know a base class of ModelOpt's
BGDModeConfig: Any = _create(
    "BGDModeConfig",
    __base__=ModeloptBaseConfig,
    __module__=__name__,
    **{f.name: (Any, ModeloptField(default=_DEFAULTS[f.name])) for f in dataclasses.fields(BGDConfig)},
)
BGDModeConfig.__doc__ = (
    "The fields of `BGDConfig`, in plain values; `overrides` may be a dictionary from globs to settings."
)

BGDModeRegistry = _ModeRegistryCls("bgd")


def register() -> None:
    """Register the mode; a second call does nothing more."""
    if "bgd" not in BGDModeRegistry:
        BGDModeRegistry.register_mode(BGDModeDescriptor)


def quantize(
    model: nn.Module, config: Mapping[str, Any] | BGDConfig | None = None, forward_loop: ForwardLoop | None = None
) -> nn.Module:
    """Quantize in place, as `modelopt.torch.quantization.quantize` does.

    Args:
        model: changed in place.
        config: fields of `BGDConfig`. `overrides` may be a dictionary such as `{"*head": {"enable": False}}` or
            `{"layer4.*": {"block_size": 18}}`: the first glob that matches a layer's name wins.
        forward_loop: runs the model on calibration data, or the batches themselves, as `bgd_plugin.quantize` takes
            them; without it each weight is fitted by itself.

    Returns:
        the model.

    Raises:
        ConfigError: settings that do not suit the network; a network that ModelOpt has quantized, or whose layers
            another mode of ModelOpt has replaced.
    """
    register()
    values = config.to_dict() if isinstance(config, BGDConfig) else dict(config or {})
    values.pop("version", None)
    _check_before(model)
    arguments = {"forward_loop": forward_loop}
    result: nn.Module = mto.apply_mode(model, [("bgd", values)], registry=BGDModeRegistry, mode_kwargs=[arguments])
    return result


def report(model: nn.Module) -> dict[str, Any]:
    """The report of the last application of the mode, as `Report.to_dict()`; it is saved with the model.

    Raises:
        ConfigError: the mode was never applied.
    """
    states = mto.modelopt_state(model)["modelopt_state_dict"]
    found = [state["metadata"]["report"] for name, state in states if name == "bgd"]
    if not found:
        raise ConfigError("the mode 'bgd' was not applied to this model")
    result: dict[str, Any] = found[-1]
    return result


class BGDModeDescriptor(ModeDescriptor):
    """The mode "bgd"."""

    @property
    def name(self) -> str:
        """The name of the mode: "bgd"."""
        return "bgd"

    @property
    def config_class(self) -> Any:
        """The class of the mode's settings."""
        return BGDModeConfig

    @property
    def next_prohibited_modes(self) -> set[str]:
        """Modes that may not follow: they look for float layers, and would skip quantized ones without a warning."""
        return {"quantize", "real_quantize", "sparse_magnitude", "sparsegpt", "autonas", "fastnas", "gradnas"}

    @property
    def convert(self) -> Any:
        """The function that quantizes a model."""
        return _convert

    @property
    def restore(self) -> Any:
        """The function that puts empty quantized layers into a float model, before its state dict is loaded."""
        return _restore


def _convert(model: nn.Module, config: Any, forward_loop: ForwardLoop | None = None) -> tuple[nn.Module, Any]:
    _check_before(model)
    before = integration.placement_of(model)
    settings = _core_config(config, model)
    for pattern, setting in settings.overrides:
        twice = [path for path in before if setting is not None and fnmatch.fnmatchcase(path, pattern)]
        if twice:
            raise ConfigError(
                f"override {pattern!r}: layer {twice[0]!r} is already quantized, by an earlier mode 'bgd'"
            )
    if forward_loop is None:
        result = bgd.quantize_weights(model, settings)
    elif callable(forward_loop):
        calls = _recorded(model, forward_loop)
        result = bgd.quantize(model, calls, settings, forward=lambda net, call: net(*call[0], **call[1]))
    else:
        result = bgd.quantize(model, forward_loop, settings)
    integration.transplant_(model, result.model)
    placement = {path: list(sizes) for path, sizes in integration.placement_of(model).items() if path not in before}
    codes = {path: digest for path, digest in _codes_of(model).items() if path not in before}
    return model, {"placement": placement, "codes": codes, "report": result.report.to_dict()}


def _restore(model: nn.Module, config: Any, metadata: Mapping[str, Any]) -> nn.Module:
    placement = metadata.get("placement")
    if not isinstance(placement, Mapping):
        raise CheckpointError("the saved state of the mode 'bgd' has no placement of its layers: it is damaged")
    integration.make_room_(model, placement)
    hooked: Any = model  # torch has no types for this
    hooked.register_load_state_dict_post_hook(_CodesAsSaved(metadata.get("codes", {})))
    return model


class _CodesAsSaved:
    """A hook that compares loaded codes with the saved ones, which training does not change."""

    def __init__(self, codes: Mapping[str, str]) -> None:
        self.codes = dict(codes)

    def __call__(self, model: nn.Module, incompatible: Any) -> None:
        """Refuse codes that differ.

        Raises:
            CheckpointError: naming the layers.
        """
        found = _codes_of(model)
        loaded = {path for path in found if f"{path}.codes" not in incompatible.missing_keys}
        changed = [path for path, digest in self.codes.items() if path in loaded and found[path] != digest]
        if changed:
            raise CheckpointError(
                f"the codes of {', '.join(changed)} are not those that were saved with this state: the file was "
                "damaged or edited, or its weights are of another network"
            )


def _codes_of(model: nn.Module) -> dict[str, str]:
    """A fingerprint of the codes and the mask of each quantized layer, by its path."""
    layers = {path: module for path, module in model.named_modules() if isinstance(module, PQModule)}
    return {path: _fingerprint(layer) for path, layer in layers.items() if not layer.codes.is_meta}


def _fingerprint(layer: PQModule) -> str:
    """Codes wider than a byte are hashed as 16-bit numbers, as in states saved by earlier versions."""
    is_wide = 256 < layer.codebook_size <= 32768
    digest = hashlib.sha256()
    for tensor in (layer.codes.to(torch.int16) if is_wide else layer.codes, layer.mask):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _core_config(config: Any, model: nn.Module) -> BGDConfig:
    """The core's settings; fields that an override leaves out are those of the layer's kind."""
    values = config.model_dump()
    overrides = values.pop("overrides")
    result = BGDConfig.from_dict(values)
    if not isinstance(overrides, Mapping):
        return dataclasses.replace(result, overrides=BGDConfig.from_dict({"overrides": overrides}).overrides)
    families = integration.layers_in(model)[0] if overrides else {}
    complete: list[tuple[str, LayerConfig | None]] = []
    for pattern, entry in overrides.items():
        setting = _setting(pattern, entry)
        names = [name for name in families if fnmatch.fnmatchcase(name, pattern)]
        if setting is None or not names:  # the core refuses a name that matches nothing
            complete.append((pattern, None if setting is None else LayerConfig(**setting)))
            continue
        for name in names:
            own = result.setting_for(families[name]) or LayerConfig()
            complete.append((glob.escape(name), LayerConfig(**dataclasses.asdict(own) | setting)))
    return dataclasses.replace(result, overrides=tuple(complete))


def _setting(pattern: str, entry: Any) -> dict[str, Any] | None:
    """An override in ModelOpt's terms: `enable` turns a layer on or off, and None keeps it float.

    Raises:
        ConfigError: not a setting, or an unknown field.
    """
    fields = dataclasses.asdict(entry) if isinstance(entry, LayerConfig) else entry
    if fields is None:
        return None
    known = {field.name for field in dataclasses.fields(LayerConfig)} | {"enable"}
    if not isinstance(fields, Mapping) or set(fields) - known:
        raise ConfigError(f"override {pattern!r}: found {entry!r}, give some of {', '.join(sorted(known))}, or None")
    enabled = fields.get("enable", True)
    if not isinstance(enabled, bool):
        raise ConfigError(f"override {pattern!r}: enable={enabled!r}, give True or False")
    return {key: value for key, value in fields.items() if key != "enable"} if enabled else None


def _check_before(model: nn.Module) -> None:
    """Refuse a network in which a mode of ModelOpt has replaced layers.

    Raises:
        ConfigError: naming one of them, and what to do.
    """
    for name, module in model.named_modules():
        if isinstance(module, DynamicModule):
            raise ConfigError(
                f"{name!r} is a {type(module).__name__} of a ModelOpt mode: a network that ModelOpt has quantized "
                "cannot be quantized again; after sparsity, distillation or a search, export first (mts.export, "
                "mtd.export, mtn.export)"
            )


@torch.no_grad()
def _recorded(model: nn.Module, forward_loop: Callable[[nn.Module], Any]) -> list[Any]:
    """The arguments of each call of the model by the loop, in evaluation mode."""
    calls: list[Any] = []

    def record(_: nn.Module, args: Any, kwargs: Any) -> None:
        calls.append((args, kwargs))

    modes = {module: module.training for module in model.modules()}
    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        model.eval()
        forward_loop(model)
    finally:
        handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not calls:
        raise integration.CalibrationError("forward_loop(model) returned without calling the model")
    return calls
