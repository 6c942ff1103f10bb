"""The command `bgd-plugin plan`: what would be quantized, and how large the file would be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bgd_plugin.cli.arguments import ImageCount, ImageOptions, Json, ModelName, SettingsOptions, Weights
from bgd_plugin.cli.groups import with_groups
from bgd_plugin.errors import ConfigError

__all__ = ["plan"]


@with_groups
def plan(
    model: ModelName,
    *,
    weights: Weights = None,
    what: SettingsOptions,
    calibration: Annotated[
        Path | None, typer.Option(help="folder of images: measure the curve of bytes against expected divergence")
    ] = None,
    images: ImageCount = 256,
    read: ImageOptions,
    picture: Annotated[Path | None, typer.Option(help="write the curve as an SVG picture")] = None,
    as_json: Json = False,
) -> None:
    """Show which layers would be quantized, how, and the size of the file; with images also the expected loss."""
    from bgd_plugin.cli.images import CalibrationImages, preprocessing
    from bgd_plugin.cli.models import named_model
    from bgd_plugin.planning.make import plan as make_plan

    if picture is not None and calibration is None:
        raise ConfigError("--picture shows a measured curve: give --calibration FOLDER")
    settings = what.settings()
    # preserved zeros and a measured curve need the weights' values
    only_shapes = not settings.preserve_zeros and calibration is None
    network = named_model(model, weights, only_shapes=only_shapes)
    data = None
    if calibration is not None:
        transform = network.transform or preprocessing(read)
        data = CalibrationImages(calibration, transform, images=images, batch_size=read.batch_size, seed=settings.seed)
    result = make_plan(network.model.eval(), settings, data)
    if picture is not None:
        result.to_svg(picture)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
