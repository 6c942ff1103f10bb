"""The command `bgd-plugin quantize`: a network and a folder of images become a compressed file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bgd_plugin.cli.arguments import (
    Device,
    ImageCount,
    ImageOptions,
    ModelName,
    SettingsOptions,
    Weights,
    Workers,
)
from bgd_plugin.cli.groups import with_groups
from bgd_plugin.cli.options import with_distillation, with_finetuning, with_reconstruction
from bgd_plugin.cli.stopping import says_how_to_go_on
from bgd_plugin.errors import ConfigError

__all__ = ["quantize"]


@with_groups
def quantize(
    model: ModelName,
    *,
    calibration: Annotated[
        Path, typer.Option(help="folder of images, flat or one subfolder per class; labels are ignored")
    ],
    output: Annotated[Path, typer.Option(help="the file to write")] = Path("net.safetensors"),
    weights: Weights = None,
    what: SettingsOptions,
    distill_steps: Annotated[int | None, typer.Option(min=1, help="gradient steps for each layer's codewords")] = None,
    reconstruct_steps: Annotated[int | None, typer.Option(min=1, help="gradient steps for each block")] = None,
    distillation: Annotated[bool, typer.Option(help="run the distillation of the settings, or skip it")] = True,
    finetune_epochs: Annotated[int | None, typer.Option(min=1, help="passes over all images of the folder")] = None,
    finetune_mixing: Annotated[
        bool, typer.Option("--finetune-mixing", help="blend images with one another, for small folders")
    ] = False,
    finetuning: Annotated[bool, typer.Option(help="run the finetuning of the settings, or skip it")] = True,
    images: ImageCount = 1024,
    read: ImageOptions,
    memory: Annotated[
        float,
        typer.Option(min=1, help="MiB of calibration images and values kept in memory; the rest goes to disk"),
    ] = 512,
    reproducible: Annotated[
        bool,
        typer.Option("--reproducible", help="compute on one thread: the file does not depend on the number of threads"),
    ] = False,
    workers: Workers = 0,
    device: Device = "cpu",
    teacher: Annotated[str | None, typer.Option(help="MODEL whose outputs training matches [default: MODEL]")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="as --weights")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="folder that saves progress, to resume a stopped run")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="resume the run in --checkpoint; an error if there is none")
    ] = False,
    report: Annotated[
        Path | None, typer.Option(help="write an HTML page with the size and error of each layer")
    ] = None,
    json_file: Annotated[
        str | None, typer.Option("--json", help="write the report as JSON to this file; - for the terminal")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="random seed [default: the seed of the settings, 0]")] = None,
) -> None:
    """Compress a network, calibrated on a folder of images."""
    from bgd_plugin import quantize as quantize_model
    from bgd_plugin import save
    from bgd_plugin.cli.images import CalibrationImages, preprocessing
    from bgd_plugin.cli.models import network_on
    from bgd_plugin.support.processes import is_first, process_group

    if resume:
        _require_run(checkpoint)
    settings = what.settings()
    _require_folders(output, report, None if json_file == "-" else json_file)
    settings = settings if seed is None else replace(settings, seed=seed)
    with process_group(device) as place:
        network = network_on(model, weights, place)
        guide = network_on(teacher, teacher_weights, place).model if teacher else None
        transform = network.transform or preprocessing(read)
        data = CalibrationImages(
            calibration, transform, images=images, batch_size=read.batch_size, seed=settings.seed, workers=workers
        )
        settings = with_distillation(settings, distill_steps, distillation)
        settings = with_reconstruction(settings, reconstruct_steps)
        settings = with_finetuning(settings, finetune_epochs, finetuning, data.steps_per_epoch, finetune_mixing)
        with says_how_to_go_on(checkpoint):
            result = quantize_model(
                network.model,
                data,
                settings,
                teacher=guide,
                checkpoint=checkpoint,
                memory_bytes=int(memory * 2**20),
                reproducible=reproducible,
            )
        if not is_first():
            return
    save(result.model, output)
    _show(result.report, report, json_file)
    typer.echo(f"written: {output}", err=True)


def _show(found: Any, page: Path | None, json_file: str | None) -> None:
    """Write the report where it is asked for; the terminal gets it as a table, or as JSON for the file `-`."""
    if page:
        found.to_html(page)
    if json_file and json_file != "-":
        Path(json_file).write_text(found.to_json(), encoding="utf-8")
    typer.echo(found.to_json() if json_file == "-" else str(found))


def _require_folders(*paths: Path | str | None) -> None:
    """Fail before the work starts if an output could not be written."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(f"{path}: the folder {Path(path).parent} does not exist: create it first")


def _require_run(checkpoint: Path | None) -> None:
    """Fail if `--resume` was given and there is no run to resume."""
    from bgd_plugin.quantization.resume import holds_run

    if checkpoint is None:
        raise ConfigError("--resume: give --checkpoint FOLDER, the folder of the run to resume")
    if not holds_run(checkpoint):
        raise ConfigError(f"--resume: {checkpoint} contains no run: leave --resume out to start one there")
