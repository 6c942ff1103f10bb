"""Builds the page of `make demo-web`: a compressed EfficientNet-Lite0, its float original, photos, and onnxruntime-web.

    python examples/web/build.py OUTPUT

Everything comes from installed packages and the npm package onnxruntime-web; the page asks nothing of the network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.cli import demo
from bgd_plugin.cli.images import opened

__all__ = ["build"]

_HERE = Path(__file__).parent
_PAGE = ("index.html", "style.css", "app.js", "resize.js")
_RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
_NPM_PACKAGE = "onnxruntime-web@1.30.0"
_LAYER = bgd.LayerConfig(block_size=4, codebook_size=256)
CONFIG = bgd.BGDConfig(pointwise_conv=_LAYER, linear=_LAYER, max_divergence=None)


def build(output: Path) -> dict[str, Any]:
    """Write the page and all that it needs into a folder; what is there already is not made again.

    Returns:
        bytes of both networks, and the compressed network's top class for each photo, as torch gives it.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in _PAGE:
        shutil.copyfile(_HERE / name, output / name)
    _runtime(output)
    facts = output / "facts.json"
    if not facts.is_file():
        facts.write_text(json.dumps(_networks(output), indent=1), encoding="utf-8")
    result: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
    return result


def _networks(output: Path) -> dict[str, Any]:
    files, model = demo.photos(), demo.network()
    print("compressing EfficientNet-Lite0: a few minutes, once", flush=True)
    small = bgd.quantize(model, demo.calibration(files, 6), CONFIG).model
    inputs = torch.stack([demo.PREPROCESSING(opened(file)) for file in files])
    done = bgd.export(small, output / "network.onnx", inputs[:1], dynamic=True)
    print(done)
    _export_float(model, output / "float.onnx", inputs[:1])
    (output / "photos").mkdir(exist_ok=True)
    with torch.no_grad():
        answers = torch.cat([small(image[None]) for image in inputs]).softmax(1)
    for file in files:
        shutil.copyfile(file, output / "photos" / file.name)
    return {
        "bytes": done.size_bytes,
        "float_bytes": (output / "float.onnx").stat().st_size,
        "labels": _labels(),
        "photos": [
            {"file": file.name, "answer": int(row.argmax()), "probability": float(row.max())}
            for file, row in zip(files, answers, strict=True)
        ],
    }


def _export_float(model: nn.Module, path: Path, example: torch.Tensor) -> None:
    torch.onnx.export(model, (example,), str(path), dynamo=True, external_data=False, verbose=False)


def _labels() -> list[str]:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    return list(_IMAGENET_CATEGORIES)


def _runtime(output: Path) -> None:
    """The runtime's three files, out of the npm package."""
    if all((output / name).is_file() for name in _RUNTIME):
        return
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("npm is missing, which fetches the package onnxruntime-web: on Debian, apt-get install npm")
    folder = output / "npm"
    folder.mkdir(exist_ok=True)
    command = [npm, "install", "--ignore-scripts", "--no-save", "--prefix", str(folder), _NPM_PACKAGE]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for name in _RUNTIME:
        shutil.copyfile(folder / "node_modules" / "onnxruntime-web" / "dist" / name, output / name)
    shutil.rmtree(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
