"""The command line `bgd-plugin`: plan, quantize, export, inspect, evaluate, adapters, demo.

Slow imports are left to the commands that need them, so that `--help` responds at once. A user error prints a message
and exits with code 2; Ctrl-C prints one line and exits with code 130.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from bgd_plugin.cli.export import export
from bgd_plugin.cli.options import (
    Interpolation,
    Regime,
    preprocessing,
    settings_from,
    with_budget,
    with_distillation,
    with_finetuning,
    with_reconstruction,
)
from bgd_plugin.errors import BGDError, ConfigError

if TYPE_CHECKING:
    from bgd_plugin.cli.models import NamedModel

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Turns user errors into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader closed the pipe, as in `| head`: not a user error
            raise
        except (BGDError, OSError) as error:
            typer.echo(f"bgd-plugin: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("bgd-plugin: stopped", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress trained networks by product quantization of their weights.",
)

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
        help="GLOB=block,codebook or GLOB=float, a setting for layers by name; first match wins; repeatable",
    ),
]
FcCodebook = Annotated[int | None, typer.Option(help="codewords per linear layer")]
TargetSize = Annotated[
    str | None,
    typer.Option(help="maximum file size, such as 5MB or 4.8MiB; block and codebook sizes are chosen to meet it"),
]
TargetRatio = Annotated[float | None, typer.Option(help="compression ratio to reach, instead of --target-size")]
FreezeNorms = Annotated[
    bool,
    typer.Option("--freeze-norms", help="store batch norms as one scale and one shift per channel, in half the bytes"),
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
_MEAN, _STD = "0.485,0.456,0.406", "0.229,0.224,0.225"


@app.command()
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


@app.command()
def quantize(
    model: ModelName,
    calibration: Annotated[
        Path, typer.Option(help="folder of images, flat or one subfolder per class; labels are ignored")
    ],
    output: Annotated[Path, typer.Option(help="the file to write")] = Path("net.safetensors"),
    weights: Weights = None,
    regime: RegimeOption = Regime.default,
    config: ConfigFile = None,
    override: Overrides = None,
    fc_codebook_size: FcCodebook = None,
    pointwise_block_size: PointwiseBlock = None,
    target_size: TargetSize = None,
    target_ratio: TargetRatio = None,
    freeze_norms: FreezeNorms = False,
    distill_steps: Annotated[int | None, typer.Option(min=1, help="gradient steps for each layer's codewords")] = None,
    reconstruct_steps: Annotated[int | None, typer.Option(min=1, help="gradient steps for each block")] = None,
    distillation: Annotated[bool, typer.Option(help="run the distillation of the settings, or skip it")] = True,
    finetune_epochs: Annotated[int | None, typer.Option(min=1, help="passes over all images of the folder")] = None,
    finetune_mixing: Annotated[
        bool, typer.Option("--finetune-mixing", help="blend images with one another, for small folders")
    ] = False,
    finetuning: Annotated[bool, typer.Option(help="run the finetuning of the settings, or skip it")] = True,
    images: Annotated[int, typer.Option(min=1, help="number of calibration images, chosen at random")] = 1024,
    batch_size: BatchSize = 64,
    size: Size = 224,
    resize: Resize = 256,
    mean: Mean = _MEAN,
    std: Std = _STD,
    interpolation: Resampling = Interpolation.bilinear,
    memory: Annotated[
        float | None,
        typer.Option(min=1, help="MiB of calibration images and values kept in memory; the rest goes to disk"),
    ] = None,
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
    from bgd_plugin.cli.images import CalibrationImages
    from bgd_plugin.support.processes import is_first, process_group

    if resume:
        _require_run(checkpoint)
    settings = settings_from(regime, config, override, fc_codebook_size, pointwise_block_size)
    settings = with_budget(settings, target_size, target_ratio, freeze_norms)
    _require_folders(output, report, None if json_file == "-" else json_file)
    settings = settings if seed is None else replace(settings, seed=seed)
    with process_group(device) as place:
        network = _network(model, weights, place)
        guide = _network(teacher, teacher_weights, place).model if teacher else None
        transform = network.transform or preprocessing(size, resize, mean, std, interpolation)
        data = CalibrationImages(
            calibration, transform, images=images, batch_size=batch_size, seed=settings.seed, workers=workers
        )
        settings = with_distillation(settings, distill_steps, distillation)
        settings = with_reconstruction(settings, reconstruct_steps)
        settings = with_finetuning(settings, finetune_epochs, finetuning, data.steps_per_epoch, finetune_mixing)
        with _says_how_to_go_on(checkpoint):
            result = quantize_model(
                network.model,
                data,
                settings,
                teacher=guide,
                checkpoint=checkpoint,
                memory_bytes=None if memory is None else int(memory * 2**20),
                reproducible=reproducible,
            )
        if not is_first():
            return
    save(result.model, output)
    if report:
        result.report.to_html(report)
    if json_file and json_file != "-":
        Path(json_file).write_text(result.report.to_json(), encoding="utf-8")
    typer.echo(result.report.to_json() if json_file == "-" else str(result.report))
    typer.echo(f"written: {output}", err=True)


app.command()(export)


@app.command()
def inspect(file: PQFile, as_json: Json = False) -> None:
    """Show the contents of a compressed file. Needs no network."""
    from bgd_plugin.files.inspection import inspected, inspection_text

    content = inspected(file)
    typer.echo(json.dumps(content, indent=2) if as_json else inspection_text(content))


@app.command()
def evaluate(
    model: ModelName,
    file: PQFile,
    images: Annotated[
        Path,
        typer.Option(help="one subfolder per class, or a flat folder of files whose names end in the class number"),
    ],
    weights: Weights = None,
    with_float: Annotated[
        bool, typer.Option("--float", help="also evaluate the float network, with --weights")
    ] = False,
    batch_size: BatchSize = 64,
    size: Size = 224,
    resize: Resize = 256,
    mean: Mean = _MEAN,
    std: Std = _STD,
    interpolation: Resampling = Interpolation.bilinear,
    workers: Workers = 0,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure top-1 and top-5 accuracy of a compressed file on labelled images."""
    from bgd_plugin.cli.images import accuracy, answers, labelled
    from bgd_plugin.files.network import load
    from bgd_plugin.support.tables import table

    files = labelled(images)
    network = _network(model, weights, device, weights_matter=with_float)
    transform = network.transform or preprocessing(size, resize, mean, std, interpolation)
    found: dict[str, Any] = {"images": len(files)}
    networks = {"float": network.model} if with_float else {}
    for name, one in (networks | {"compressed": load(file, like=network.model)}).items():
        given = answers(one.eval(), files, transform, batch_size=batch_size, workers=workers)
        found[name] = accuracy(given) | {"answers": [vars(answer) for answer in given]}
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    names = [name for name in ("float", "compressed") if name in found]
    rows = [[name, f"{found[name]['top1']:.2%}", f"{found[name]['top5']:.2%}", len(files)] for name in names]
    typer.echo(table(["network", "top-1", "top-5", "images"], rows))


@app.command()
def adapters(as_json: Json = False) -> None:
    """List the adapters for other frameworks, their versions, and whether they can be imported."""
    from bgd_plugin.adapters import adapters as installed
    from bgd_plugin.support.tables import table

    found = installed()
    if as_json:
        typer.echo(json.dumps([asdict(adapter) for adapter in found], indent=2))
        return
    if not found:
        typer.echo("no adapter found: install bgd-plugin with pip")
        return
    rows = [[a.name, ", ".join(map(str, a.requirements)), a.problem or "can be imported"] for a in found]
    typer.echo(table(["adapter", "needs", "state"], rows))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the file, the photos and the report")] = Path("demo-report"),
) -> None:
    """Compress EfficientNet-Lite0, and compare it with the float network on 20 photos."""
    from bgd_plugin.cli.demo import run

    run(output)


def _network(name: str, weights: str | None, device: str, *, weights_matter: bool = True) -> NamedModel:
    import torch

    from bgd_plugin.cli.models import named_model

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device!r}: give cpu, cuda or cuda:N") from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {device}: torch found no GPU: leave the option out")
    found = named_model(name, weights)
    if weights_matter and not found.has_weights:
        typer.echo(
            f"bgd-plugin: {name} has random weights: give --weights FILE or --weights DEFAULT for trained ones",
            err=True,
        )
    found.model.to(place)
    return found


def _require_folders(*paths: Path | str | None) -> None:
    """Fail before the work starts if an output could not be written."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(f"{path}: the folder {Path(path).parent} does not exist: create it first")


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which ends a run like Ctrl-C."""


def _terminated(*_: object) -> None:
    raise _Terminated


@contextmanager
def _says_how_to_go_on(checkpoint: Path | None) -> Iterator[None]:
    """End Ctrl-C and SIGTERM with one line that says how to resume the run."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        how = (
            f"progress is saved in {checkpoint}; add --resume to the same command to continue"
            if checkpoint
            else "no progress saved; pass --checkpoint FOLDER to be able to resume"
        )
        typer.echo(f"\nbgd-plugin: stopped; {how}", err=True)
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_run(checkpoint: Path | None) -> None:
    """Fail if `--resume` was given and there is no run to resume."""
    from bgd_plugin.quantization.resume import holds_run

    if checkpoint is None:
        raise ConfigError("--resume: give --checkpoint FOLDER, the folder of the run to resume")
    if not holds_run(checkpoint):
        raise ConfigError(f"--resume: {checkpoint} contains no run: leave --resume out to start one there")


def main() -> None:
    """The console script."""
    app()
