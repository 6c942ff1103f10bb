"""The command `bgd-plugin plan`: what would be quantized, and how large the file would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgd_plugin.cli.arguments import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    BatchSize,
    CodesOption,
    ConfigFile,
    FcCodebook,
    FixedSizes,
    FreezeNorms,
    Json,
    MaxDivergence,
    Mean,
    ModelName,
    Overrides,
    PointwiseBlock,
    RegimeOption,
    Resampling,
    Resize,
    Size,
    Std,
    TargetRatio,
    TargetSize,
    Weights,
)
from bgd_plugin.cli.options import Interpolation, Regime, settings_from, with_budget
from bgd_plugin.errors import ConfigError

__all__ = ["plan"]


def plan(
    model: ModelName,
    weights: Weights = None,
    regime: RegimeOption = Regime.default,
    config: ConfigFile = None,
    override: Overrides = None,
    fc_codebook_size: FcCodebook = None,
    pointwise_block_size: PointwiseBlock = None,
    target_size: TargetSize = None,
    target_ratio: TargetRatio = None,
    max_divergence: MaxDivergence = None,
    fixed_sizes: FixedSizes = False,
    freeze_norms: FreezeNorms = False,
    codes: CodesOption = None,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of images: measure the curve of bytes against expected divergence")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="number of calibration images, chosen at random")] = 256,
    batch_size: BatchSize = 64,
    size: Size = 224,
    resize: Resize = 256,
    mean: Mean = IMAGENET_MEAN,
    std: Std = IMAGENET_STD,
    interpolation: Resampling = Interpolation.bilinear,
    picture: Annotated[Path | None, typer.Option(help="write the curve as an SVG picture")] = None,
    as_json: Json = False,
) -> None:
    """Show which layers would be quantized, how, and the size of the file; with images also the expected loss."""
    from bgd_plugin.cli.images import CalibrationImages, preprocessing
    from bgd_plugin.cli.models import named_model
    from bgd_plugin.planning.make import plan as make_plan

    if picture is not None and calibration is None:
        raise ConfigError("--picture shows a measured curve: give --calibration FOLDER")
    settings = settings_from(regime, config, override, fc_codebook_size, pointwise_block_size)
    settings = with_budget(settings, target_size, target_ratio, freeze_norms, max_divergence, fixed_sizes, codes)
    # preserved zeros and a measured curve need the weights' values
    only_shapes = not settings.preserve_zeros and calibration is None
    network = named_model(model, weights, only_shapes=only_shapes)
    data = None
    if calibration is not None:
        transform = network.transform or preprocessing(size, resize, mean, std, interpolation)
        data = CalibrationImages(calibration, transform, images=images, batch_size=batch_size, seed=settings.seed)
    result = make_plan(network.model.eval(), settings, data)
    if picture is not None:
        result.to_svg(picture)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
