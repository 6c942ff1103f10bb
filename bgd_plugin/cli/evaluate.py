"""The command `bgd-plugin evaluate`: top-1 and top-5 accuracy on labelled images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bgd_plugin.cli.arguments import Device, ImageOptions, Json, ModelName, PQFile, Weights, Workers
from bgd_plugin.cli.groups import with_groups

__all__ = ["evaluate"]


@with_groups
def evaluate(
    model: ModelName,
    file: PQFile,
    *,
    images: Annotated[
        Path,
        typer.Option(help="one subfolder per class, or a flat folder of files whose names end in the class number"),
    ],
    weights: Weights = None,
    with_float: Annotated[
        bool, typer.Option("--float", help="also evaluate the float network, with --weights")
    ] = False,
    read: ImageOptions,
    workers: Workers = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy of a compressed file on labelled images."""
    from bgd_plugin.cli.images import accuracy, answers, labelled, preprocessing
    from bgd_plugin.cli.models import network_on
    from bgd_plugin.files.load import load
    from bgd_plugin.support.tables import table

    files = labelled(images)
    network = network_on(model, weights, device, weights_matter=with_float)
    transform = network.transform or preprocessing(read)
    found: dict[str, Any] = {"images": len(files)}
    networks = {"float": network.model} if with_float else {}
    for name, one in (networks | {"compressed": load(file, like=network.model)}).items():
        given = answers(one.eval(), files, transform, batch_size=read.batch_size, workers=workers)
        found[name] = accuracy(given) | {"answers": [vars(answer) for answer in given]}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    names = [name for name in ("float", "compressed") if name in found]
    rows = [[name, f"{found[name]['top1']:.2%}", f"{found[name]['top5']:.2%}", len(files)] for name in names]
    typer.echo(table(["network", "top-1", "top-5", "images"], rows))
