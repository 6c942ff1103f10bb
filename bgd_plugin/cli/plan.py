"""The command `bgd-plugin plan`: what would be quantized, and how large the file would be."""

from __future__ import annotations

import json

import typer

from bgd_plugin.cli.arguments import (
    ConfigFile,
    FcCodebook,
    FreezeNorms,
    Json,
    ModelName,
    Overrides,
    PointwiseBlock,
    RegimeOption,
    TargetRatio,
    TargetSize,
    Weights,
)
from bgd_plugin.cli.options import (
    Regime,
    settings_from,
    with_budget,
)

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
    freeze_norms: FreezeNorms = False,
    as_json: Json = False,
) -> None:
    """Show which layers would be quantized, how, and the size of the file. Needs no data."""
    from bgd_plugin.cli.models import named_model
    from bgd_plugin.planning.make import plan as make_plan

    settings = settings_from(regime, config, override, fc_codebook_size, pointwise_block_size)
    settings = with_budget(settings, target_size, target_ratio, freeze_norms)
    network = named_model(model, weights, only_shapes=not settings.preserve_zeros)  # zeros need the values
    result = make_plan(network.model, settings)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))
