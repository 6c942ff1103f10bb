"""The command line `bgd-plugin`: plan, quantize, inspect, evaluate, adapters, demo.

Whatever takes long to import is imported by the command that needs it, so that `--help` answers at once. A user's
mistake is a message and exit code 2; Ctrl-C is a line and exit code 130.
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
    """Turns what a user can cause into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # `| head` has seen enough: not a mistake
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
PQFile = Annotated[Path, typer.Argument(metavar="FILE", help="a file that quantize wrote", show_default=False)]
Weights = Annotated[
    str | None, typer.Option(help="a state dict (safetensors or torch.save), or weights the framework knows: DEFAULT")
]
RegimeOption = Annotated[Regime, typer.Option("--regime", "--method", help="named settings")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="settings as JSON, instead of --regime")]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--override", help="GLOB=block,codebook or GLOB=float, for layers by name; first match wins; repeatable"
    ),
]
FcCodebook = Annotated[int | None, typer.Option(help="codewords of linear layers")]
TargetSize = Annotated[
    str | None, typer.Option(help="longest file, such as 5MB or 4.8MiB: sizes are chosen layer by layer to meet it")
]
TargetRatio = Annotated[
    float | None, typer.Option(help="the same as a ratio: how many times smaller the file is to be")
]
FreezeNorms = Annotated[
    bool, typer.Option("--freeze-norms", help="batch norms as a factor and a summand each, in half the bytes")
]
PointwiseBlock = Annotated[int | None, typer.Option(help="block size of 1x1 convolutions")]
Size = Annotated[int, typer.Option(help="centre crop, pixels")]
Resize = Annotated[int, typer.Option(help="shorter side before the crop, pixels")]
Mean = Annotated[str, typer.Option(help="per channel, of values from 0 to 1")]
Std = Annotated[str, typer.Option(help="per channel, of values from 0 to 1")]
Resampling = Annotated[Interpolation, typer.Option("--interpolation", help="of resizing")]
BatchSize = Annotated[int, typer.Option(min=1, help="images in a batch")]
Workers = Annotated[int, typer.Option(min=0, help="processes that read images")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ...")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]
# of ImageNet, as nearly every published network has it
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
    """Say what would be quantized, into what, and how large the file would be. Needs no data."""
    from bgd_plugin.cli.models import named_model
    from bgd_plugin.planning.make import plan as make_plan

    settings = settings_from(regime, config, override, fc_codebook_size, pointwise_block_size)
    settings = with_budget(settings, target_size, target_ratio, freeze_norms)
    network = named_model(model, weights, only_shapes=not settings.preserve_zeros)  # zeros are seen in values alone
    result = make_plan(network.model, settings)
    typer.echo(json.dumps(result.to_dict(), indent=2) if as_json else str(result))


@app.command()
def quantize(
    model: ModelName,
    calibration: Annotated[Path, typer.Option(help="folder of images, flat or one folder a class; labels are ignored")],
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
    distillation: Annotated[bool, typer.Option(help="whether the settings' distillation is done")] = True,
    finetune_epochs: Annotated[int | None, typer.Option(min=1, help="walks over all images of the folder")] = None,
    finetune_mixing: Annotated[
        bool, typer.Option("--finetune-mixing", help="blend images with one another, where there are few")
    ] = False,
    finetuning: Annotated[bool, typer.Option(help="whether the settings' finetuning is done")] = True,
    images: Annotated[int, typer.Option(min=1, help="calibration images, a seeded choice")] = 1024,
    batch_size: BatchSize = 64,
    size: Size = 224,
    resize: Resize = 256,
    mean: Mean = _MEAN,
    std: Std = _STD,
    interpolation: Resampling = Interpolation.bilinear,
    memory: Annotated[
        float | None, typer.Option(min=1, help="MiB for calibration images and values, beyond which they go to disk")
    ] = None,
    reproducible: Annotated[
        bool, typer.Option("--reproducible", help="one thread: the same bytes for any number of threads")
    ] = False,
    workers: Workers = 0,
    device: Device = "cpu",
    teacher: Annotated[str | None, typer.Option(help="MODEL whose answers training follows [default: MODEL]")] = None,
    teacher_weights: Annotated[str | None, typer.Option(help="as --weights")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="folder for finished layers, to go on after a stop")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the run in --checkpoint; an error if none")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="write a page with bytes and error of each layer")] = None,
    json_file: Annotated[str | None, typer.Option("--json", help="write the report as JSON to a file, or - ")] = None,
    seed: Annotated[int | None, typer.Option(help="of every random choice [default: the settings', 0]")] = None,
) -> None:
    """Compress a network, by what its layers compute on a folder of images."""
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


@app.command()
def inspect(file: PQFile, as_json: Json = False) -> None:
    """Say what is in a compressed file. Needs no network."""
    from bgd_plugin.files.inspection import inspected, inspection_text

    content = inspected(file)
    typer.echo(json.dumps(content, indent=2) if as_json else inspection_text(content))


@app.command()
def evaluate(
    model: ModelName,
    file: PQFile,
    images: Annotated[
        Path, typer.Option(help="one folder a class, or a flat folder whose names end in the class number")
    ],
    weights: Weights = None,
    with_float: Annotated[
        bool, typer.Option("--float", help="also the float network, for which --weights count")
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
    """Top-1 and top-5 accuracy of a compressed file on labelled images."""
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
        typer.echo("no adapter is installed: is bgd-plugin itself installed, with `pip install`?")
        return
    rows = [[a.name, ", ".join(map(str, a.requirements)), a.problem or "can be imported"] for a in found]
    typer.echo(table(["adapter", "needs", "state"], rows))


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for file, photos and report")] = Path("demo-report"),
) -> None:
    """Compress EfficientNet-Lite0, and let it answer 20 photos beside the float network."""
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
        raise ConfigError(f"--device {device}: this torch sees no GPU; leave the option out")
    found = named_model(name, weights)
    if weights_matter and not found.has_weights:
        typer.echo(
            f"bgd-plugin: {name} has random weights; --weights FILE or --weights DEFAULT gives real ones", err=True
        )
    found.model.to(place)
    return found


def _require_folders(*paths: Path | str | None) -> None:
    """Refuse before the work what could not be written after it."""
    for path in paths:
        if path is not None and not Path(path).parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {Path(path).parent}: make it first")


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


def _terminated(*_: object) -> None:
    raise _Terminated


@contextmanager
def _says_how_to_go_on(checkpoint: Path | None) -> Iterator[None]:
    """Ctrl-C and SIGTERM end with one line: what is kept, and how the run goes on."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        how = (
            f"the same command with --resume goes on from what {checkpoint} holds"
            if checkpoint
            else "nothing was kept; with --checkpoint FOLDER the same command would go on from there"
        )
        typer.echo(f"\nbgd-plugin: stopped; {how}", err=True)
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _require_run(checkpoint: Path | None) -> None:
    """Refuse to begin from the start where a run was to go on."""
    from bgd_plugin.quantization.resume import holds_run

    if checkpoint is None:
        raise ConfigError("--resume: give --checkpoint FOLDER, the folder of the run that is to go on")
    if not holds_run(checkpoint):
        raise ConfigError(f"--resume: {checkpoint} holds no run: leave --resume out to begin one there")


def main() -> None:
    """The console script."""
    app()
