"""A language model beside other quantizers: the same linear layers, the same text, the same walk through the model.

Run `python -m tests.benchmarks.peers.language` (`make bench-peers_language`). Model and windows are those of
`tests.benchmarks.smollm2`. All arms quantize the linear layers of the blocks, and every byte of them is counted; what
is left, the tied embedding above all, is in half precision. Methods that use data get each layer's inputs in the model
whose layers before it are quantized already. Ours in the same comparison: `bgd_plugin`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import CollectedInputs, Rerun, collect_batches
from bgd_plugin.graph import copy_module
from bgd_plugin.support.tables import mib, table
from tests.benchmarks.peers.build import PackedWeight, Quantizer
from tests.benchmarks.peers.frameworks import hqq, quanto
from tests.benchmarks.peers.grids import gptq, round_to_nearest
from tests.benchmarks.smollm2 import network, perplexity, text_windows

__all__ = ["PEERS", "compressed", "linear_layers"]

PEERS: dict[str, tuple[Quantizer, bool]] = {
    "RTN g32, 2 bits": (round_to_nearest(2), False),
    "RTN g32, 3 bits": (round_to_nearest(3), False),
    "HQQ g64, 2 bits": (hqq(2), False),
    "HQQ g64, 3 bits": (hqq(3), False),
    "optimum-quanto qint2": (quanto("qint2"), False),
    "GPTQ g32, 2 bits": (gptq(2), True),
    "GPTQ g32, 3 bits": (gptq(3), True),
}
"""Each with whether it looks at the layer's inputs."""
_BLOCKS_3_BITS = bgd.LayerConfig(block_size=3, codebook_size=512)
_OWN: dict[str, bgd.BGDConfig] = {
    "bgd_plugin, trellis codes": bgd.BGDConfig(
        linear=bgd.LayerConfig(codes="trellis"), embedding=None, max_divergence=None, rotation=True
    ),
    "bgd_plugin, blocks of 3, k=512": bgd.BGDConfig(
        linear=_BLOCKS_3_BITS, embedding=None, max_divergence=None, rotation=True
    ),
}
_Row = tuple[str, float, int, float, float]


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a model by path, but its head."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {path: module for path, module in found.items() if path != "lm_head"}


@torch.no_grad()
def compressed(
    model: nn.Module, calibration: Sequence[Any], quantizer: Quantizer, *, has_inputs: bool
) -> tuple[nn.Module, int]:
    """A copy of a model whose linear layers hold what a peer has made of their weights.

    Args:
        model: the float one.
        calibration: batches.
        quantizer: the peer.
        has_inputs: whether it looks at the inputs.

    Returns:
        the copy, and the bytes of the packed weights.
    """
    student = copy_module(model)
    layers = linear_layers(student)
    if not has_inputs:
        return student, sum(_replace_(layer, quantizer, _no_inputs()) for layer in layers.values())
    reference = copy_module(student, share_tensors=True)  # layers share weights until they are replaced
    batches = collect_batches(calibration, model, device=torch.device("cpu"), forward=None)
    walk = Rerun(student, reference, batches, {path: layer.weight for path, layer in layers.items()}, [])
    return student, sum(_replace_(layers[path], quantizer, walk.inputs(path)) for path in walk.order)


def _no_inputs() -> CollectedInputs:
    return CollectedInputs("", [], [], None)


def _replace_(layer: nn.Linear, quantizer: Quantizer, inputs: CollectedInputs) -> int:
    with contextlib.redirect_stdout(io.StringIO()):
        packed: PackedWeight = quantizer(layer.weight.detach(), inputs)  # type: ignore[arg-type]
    layer.weight = nn.Parameter(packed.weight.to(layer.weight).contiguous(), requires_grad=False)
    return sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())


def _peer_row(name: str, model: Any, calibration: Sequence[Any], judging: Sequence[Tensor]) -> _Row:
    quantizer, has_inputs = PEERS[name]
    start = time.process_time()
    student, size = compressed(model, calibration, quantizer, has_inputs=has_inputs)
    seconds = time.process_time() - start
    rest = sum(p.numel() for p in student.parameters()) - _weights(model)
    return name, 8 * size / _weights(model), size + 2 * rest, perplexity(student, judging), seconds


def _own_row(name: str, model: Any, calibration: Sequence[Any], judging: Sequence[Tensor]) -> _Row:
    start = time.process_time()
    result = bgd.load_adapter("transformers").quantize_pretrained(model, calibration, _OWN[name], progress=False)
    seconds = time.process_time() - start
    layers = result.report.layers
    bits = sum(x.weights * x.bits_per_weight for x in layers) / sum(x.weights for x in layers)
    return name, bits, result.report.compressed_bytes, perplexity(result.model, judging), seconds


def _weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


def _cells(row: _Row) -> list[str]:
    name, bits, size, found, seconds = row
    return [name, f"{bits:.2f}", mib(size), f"{found:.2f}", f"{seconds:.0f}"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    run: dict[str, Callable[..., _Row]] = {**dict.fromkeys(PEERS, _peer_row), **dict.fromkeys(_OWN, _own_row)}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers.language", description=main.__doc__)
    parser.add_argument("--arms", nargs="+", default=[""], help=f"beginnings of names, of {', '.join(run)}")
    parser.add_argument("--text", type=Path, help="a text file or a folder of pages")
    parser.add_argument("--windows", type=int, default=12, help="that calibrate")
    parser.add_argument("--judging", type=int, default=8, help="windows that judge")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = network()
    calibration, judging = text_windows(options, tokenizer)
    print(f"float: perplexity {perplexity(model, judging):.2f}", flush=True)
    rows = []
    for name in (name for name in run if any(name.startswith(arm) for arm in options.arms)):
        rows.append(run[name](name, model, calibration, judging))
        print(" | ".join(_cells(rows[-1])), flush=True)
    print(table(["arm", "bits a weight", "file", "perplexity", "CPU-s"], [_cells(row) for row in rows]))


if __name__ == "__main__":
    main()
