"""Turn command-line options into settings."""

from __future__ import annotations

import re
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

from bgd_plugin.config import (
    DEFAULT_DIVERGENCE,
    FAMILIES,
    BGDConfig,
    DistillationConfig,
    FinetuningConfig,
    LayerConfig,
    ReconstructionConfig,
)
from bgd_plugin.config.paper import opened
from bgd_plugin.errors import ConfigError

__all__ = [
    "Codes",
    "Interpolation",
    "Regime",
    "settings_from",
    "with_budget",
    "with_distillation",
    "with_finetuning",
    "with_reconstruction",
]


class Regime(StrEnum):
    """Named settings."""

    default = "default"
    paper_small = "paper-small"
    paper_large = "paper-large"


class Codes(StrEnum):
    """The forms of codes that a budget chooses from."""

    blocks = "blocks"
    trellis = "trellis"
    entropy = "entropy"


class Interpolation(StrEnum):
    """Interpolation for resizing images."""

    bilinear = "bilinear"
    bicubic = "bicubic"


def settings_from(
    regime: Regime, file: Path | None, overrides: list[str] | None, fc_codebook: int | None, pointwise: int | None
) -> BGDConfig:
    """The settings given by the options, except for training.

    Args:
        regime: named settings.
        file: settings as JSON, instead of a regime.
        overrides: `GLOB=block,codebook`, `GLOB=trellis` or `GLOB=float`.
        fc_codebook: number of codewords per linear layer.
        pointwise: block size of 1x1 convolutions.

    Raises:
        ConfigError: contradictory options, an invalid override, or an invalid settings file.
    """
    if file and regime != Regime.default:
        raise ConfigError("--config and --regime: give only one of them")
    if file:
        try:
            settings = BGDConfig.from_json(file.read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{file}: {error}") from error
    elif regime == Regime.default:
        settings = BGDConfig()
    else:
        settings = BGDConfig.paper("small" if regime == Regime.paper_small else "large")
    if fc_codebook is not None:
        settings = replace(settings, linear=replace(settings.linear or LayerConfig(), codebook_size=fc_codebook))
    if pointwise is not None:
        layer = settings.pointwise_conv or LayerConfig()
        settings = replace(settings, pointwise_conv=replace(layer, block_size=pointwise))
    return replace(settings, overrides=(*map(_override, overrides or ()), *settings.overrides))


def _override(text: str) -> tuple[str, LayerConfig | None]:
    pattern, _, value = text.rpartition("=")
    if pattern and value == "float":
        return pattern, None
    if pattern and value == "trellis":
        return pattern, LayerConfig(codes="trellis")
    try:
        sizes = [int(part) if part else None for part in value.split(",")]
    except ValueError:
        sizes = []
    if not pattern or len(sizes) not in (1, 2) or sizes == [None]:
        raise ConfigError(
            f"--override {text!r}: give GLOB=block,codebook, GLOB=trellis or GLOB=float, such as 'layer4.*=18,256'; "
            "one of the two sizes may be left out: 'fc=,16'"
        )
    codebook_size = sizes[1] if len(sizes) == 2 else None
    return pattern, LayerConfig(block_size=sizes[0], codebook_size=codebook_size)


_SIZE_UNITS = {"": 1, "B": 1} | {f"{m}B": 1000**i for i, m in enumerate("kMG", 1)}
_SIZE_UNITS |= {f"{m}iB": 1024**i for i, m in enumerate("KMG", 1)}


def with_budget(
    settings: BGDConfig,
    size: str | None,
    ratio: float | None,
    freeze_norms: bool = False,
    max_divergence: float | None = None,
    fixed_sizes: bool = False,
    codes: Codes | None = None,
) -> BGDConfig:
    """The settings with a budget, and the form of codes that needs one.

    Args:
        settings: without one.
        size: of the file, such as "5MB" (5,000,000 bytes) or "4.8MiB".
        ratio: original bytes / file bytes.
        freeze_norms: store batch norms as one scale and one shift per channel.
        max_divergence: a bound on the divergence, in nats.
        fixed_sizes: choose nothing.
        codes: how the file holds them; None: as in the settings.

    Raises:
        ConfigError: more than one of them, or a form of codes that needs one without it.
    """
    settings = replace(
        settings,
        freeze_norms=freeze_norms or settings.freeze_norms,
        codes=settings.codes if codes is None else codes.value,
    )
    if size is None and ratio is None and max_divergence is None:
        return replace(settings, target_bytes=None, target_ratio=None, max_divergence=None) if fixed_sizes else settings
    if fixed_sizes:
        raise ConfigError("--fixed-sizes: a budget or a bound chooses sizes: give only one of them")
    target = None if size is None else _size_bytes(size)
    if settings.method == "em" and not settings.has_budget:  # of a regime: its default sizes are chosen now
        settings = replace(settings, **opened({name: getattr(settings, name) for name in FAMILIES}))
    bound = DEFAULT_DIVERGENCE if max_divergence is None else max_divergence
    if (target is not None or ratio is not None) and max_divergence is not None:
        raise ConfigError("--max-divergence and a target size or ratio: give only one of them")
    return replace(settings, target_bytes=target, target_ratio=ratio, max_divergence=bound)


def _size_bytes(text: str) -> int:
    units = {unit.lower(): factor for unit, factor in _SIZE_UNITS.items()}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if not match or match[2] not in units:
        known = ", ".join(unit for unit in _SIZE_UNITS if unit)
        raise ConfigError(
            f"--target-size {text!r}: give a number and a unit ({known}), such as 5MB; without a unit, bytes"
        )
    return int(float(match[1]) * units[match[2]])


def with_distillation(settings: BGDConfig, steps: int | None, wanted: bool) -> BGDConfig:
    """The settings with this many distillation steps, or without distillation if not `wanted`."""
    if not wanted:
        return replace(settings, distillation=None)
    if steps is None:
        return settings
    return replace(settings, distillation=replace(settings.distillation or DistillationConfig(), steps=steps))


def with_reconstruction(settings: BGDConfig, steps: int | None) -> BGDConfig:
    """The settings with this many steps of block-wise reconstruction per block; unchanged for None."""
    if steps is None:
        return settings
    return replace(settings, reconstruction=replace(settings.reconstruction or ReconstructionConfig(), steps=steps))


def with_finetuning(
    settings: BGDConfig, epochs: int | None, wanted: bool, steps_per_epoch: int, mixing: bool = False
) -> BGDConfig:
    """The settings with finetuning; epochs are passes over the whole folder, so they are converted to steps.

    Args:
        settings: with or without finetuning.
        epochs: number of passes over the folder; None: as in the settings.
        wanted: false: no finetuning, whatever the settings say.
        steps_per_epoch: number of batches in one pass.
        mixing: blend images with one another.

    Raises:
        ConfigError: mixing without finetuning.
    """
    old = settings.finetuning
    if mixing and (not wanted or (old is None and epochs is None)):
        raise ConfigError("--finetune-mixing: finetuning is off: give --finetune-epochs too")
    if not wanted or (old is None and epochs is None):
        return replace(settings, finetuning=None)
    old = old or FinetuningConfig()
    old = replace(old, mixing=mixing or old.mixing)
    if epochs is None and old.steps is not None:
        return replace(settings, finetuning=old)
    steps = (epochs or old.epochs or 9) * steps_per_epoch
    return replace(settings, finetuning=replace(old, epochs=None, steps=steps))
