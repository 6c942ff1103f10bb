"""The command `bgd-plugin export`: a compressed file becomes one of another runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bgd_plugin.cli.arguments import ModelName, PQFile
from bgd_plugin.errors import ConfigError

__all__ = ["export"]


def export(
    file: PQFile,
    model: ModelName,
    output: Annotated[
        Path, typer.Option(help="the file to write; its suffix says what for: .onnx, .mlpackage, .pt2")
    ] = Path("net.onnx"),
    shape: Annotated[str, typer.Option(help="of the example input, which is random")] = "1,3,224,224",
    dynamic: Annotated[bool, typer.Option("--dynamic", help="any batch size")] = False,
    tolerance: Annotated[float, typer.Option(help="largest difference, relative to the output's range")] = 1e-4,
) -> None:
    """Write a compressed network for another runtime, run it there, and say how far its answers differ."""
    import torch

    from bgd_plugin.cli.models import named_model
    from bgd_plugin.exporting.export import export as export_model
    from bgd_plugin.files.load import load

    example = torch.randn(_sizes(shape), generator=torch.Generator().manual_seed(0))
    network = load(file, like=named_model(model).model)
    typer.echo(str(export_model(network, output, example, dynamic=dynamic, tolerance=tolerance)))


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--shape {text!r}: give the sizes of the example input, such as 1,3,224,224")
    return sizes
