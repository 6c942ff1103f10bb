"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bgd_plugin.cli.options import Codes, Interpolation, Regime

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "BatchSize",
    "CodesOption",
    "ConfigFile",
    "Device",
    "FcCodebook",
    "FixedSizes",
    "FreezeNorms",
    "Json",
    "MaxDivergence",
    "Mean",
    "ModelName",
    "Overrides",
    "PQFile",
    "PointwiseBlock",
    "RegimeOption",
    "Resampling",
    "Resize",
    "Size",
    "Std",
    "TargetRatio",
    "TargetSize",
    "Weights",
    "Workers",
]

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:resnet18, timm:NAME, transformers:PATH, or package.module:callable",
        show_default=False,
    ),
]
PQFile = Annotated[Path, typer.Argument(metavar="FILE", help="a file written by quantize", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="a state dict (safetensors or torch.save), or a name of pretrained weights: DEFAULT")
]
RegimeOption = Annotated[Regime, typer.Option("--regime", "--method", help="named settings")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="settings as JSON, instead of --regime")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        help="GLOB=block,codebook, GLOB=trellis or GLOB=float: a setting for layers by name; first match wins",
    ),
]
FcCodebook = Annotated[int | None, typer.Option(help="codewords per linear layer")]
TargetSize = Annotated[
    str | None,
    typer.Option(help="maximum file size, such as 5MB or 4.8MiB; block and codebook sizes are chosen to meet it"),
]
TargetRatio = Annotated[float | None, typer.Option(help="compression ratio to reach, instead of --target-size")]
MaxDivergence = Annotated[
    float | None,
    typer.Option(help="bound on the divergence from the float network; the default of a run without a target is 0.01"),
]
FixedSizes = Annotated[
    bool,
    typer.Option("--fixed-sizes", help="default sizes where the settings name none, instead of choosing them"),
]
FreezeNorms = Annotated[
    bool,
    typer.Option("--freeze-norms", help="store batch norms as one scale and one shift per channel, in half the bytes"),
]
CodesOption = Annotated[
    Codes | None,
    typer.Option(
        "--codes", help="'entropy': codes of single weights as entropy-coded streams, the smallest file; or 'blocks'"
    ),
]
PointwiseBlock = Annotated[int | None, typer.Option(help="block size of 1x1 convolutions")]
Size = Annotated[int, typer.Option(help="size of the centre crop, in pixels")]
Resize = Annotated[int, typer.Option(help="shorter side before the crop, in pixels")]
Mean = Annotated[str, typer.Option(help="mean per channel, for values from 0 to 1")]
Std = Annotated[str, typer.Option(help="standard deviation per channel, for values from 0 to 1")]
Resampling = Annotated[Interpolation, typer.Option("--interpolation", help="of resizing")]
BatchSize = Annotated[int, typer.Option(min=1, help="images per batch")]
Workers = Annotated[int, typer.Option(min=0, help="worker processes that read images")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
# of ImageNet, which nearly every published network uses
IMAGENET_MEAN, IMAGENET_STD = "0.485,0.456,0.406", "0.229,0.224,0.225"
