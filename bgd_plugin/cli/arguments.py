"""Arguments and options that several commands share, alone and in groups."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from bgd_plugin.cli.options import Codes, Interpolation, Regime, settings_from, with_budget
from bgd_plugin.config import BGDConfig

__all__ = [
    "Device",
    "ImageCount",
    "ImageOptions",
    "Json",
    "ModelName",
    "PQFile",
    "SettingsOptions",
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
ImageCount = Annotated[int, typer.Option(min=1, help="number of calibration images, chosen at random")]
Workers = Annotated[int, typer.Option(min=0, help="worker processes that read images")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@dataclass(frozen=True, kw_only=True)
class SettingsOptions:
    """What to quantize, and how."""

    regime: Annotated[Regime, typer.Option("--regime", "--method", help="named settings")] = Regime.default
    config: Annotated[Path | None, typer.Option("--config", help="settings as JSON, instead of --regime")] = None
    override: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            help="GLOB=block,codebook, GLOB=trellis or GLOB=float: a setting for layers by name; first match wins",
        ),
    ] = None
    fc_codebook_size: Annotated[int | None, typer.Option(help="codewords per linear layer")] = None
    pointwise_block_size: Annotated[int | None, typer.Option(help="block size of 1x1 convolutions")] = None
    target_size: Annotated[
        str | None,
        typer.Option(help="maximum file size, such as 5MB or 4.8MiB; block and codebook sizes are chosen to meet it"),
    ] = None
    target_ratio: Annotated[float | None, typer.Option(help="compression ratio to reach, instead of --target-size")] = (
        None
    )
    max_divergence: Annotated[
        float | None,
        typer.Option(
            help="bound on the divergence from the float network; the default of a run without a target is 0.01"
        ),
    ] = None
    fixed_sizes: Annotated[
        bool,
        typer.Option("--fixed-sizes", help="default sizes where the settings name none, instead of choosing them"),
    ] = False
    freeze_norms: Annotated[
        bool,
        typer.Option(
            "--freeze-norms", help="store batch norms as one scale and one shift per channel, in half the bytes"
        ),
    ] = False
    codes: Annotated[
        Codes | None,
        typer.Option(
            "--codes",
            help="what a budget chooses from, beside blocks: 'trellis', two bits for each weight; 'entropy', codes of "
            "single weights as entropy-coded streams, the smallest file; or 'blocks' alone",
        ),
    ] = None

    def settings(self) -> BGDConfig:
        """The settings that these options give, without those of training.

        Raises:
            ConfigError: options that contradict each other, or that cannot be read.
        """
        found = settings_from(self.regime, self.config, self.override, self.fc_codebook_size, self.pointwise_block_size)
        return with_budget(
            found,
            self.target_size,
            self.target_ratio,
            self.freeze_norms,
            self.max_divergence,
            self.fixed_sizes,
            self.codes,
        )


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How images are read. The defaults are those of most networks that were trained on ImageNet."""

    batch_size: Annotated[int, typer.Option(min=1, help="images per batch")] = 64
    size: Annotated[int, typer.Option(help="size of the centre crop, in pixels")] = 224
    resize: Annotated[int, typer.Option(help="shorter side before the crop, in pixels")] = 256
    mean: Annotated[str, typer.Option(help="mean per channel, for values from 0 to 1")] = "0.485,0.456,0.406"
    std: Annotated[str, typer.Option(help="standard deviation per channel, for values from 0 to 1")] = (
        "0.229,0.224,0.225"
    )
    interpolation: Annotated[Interpolation, typer.Option("--interpolation", help="of resizing")] = (
        Interpolation.bilinear
    )
