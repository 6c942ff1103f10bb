"""A language model beside other quantizers: the same linear layers, the same text, the same walk through the model.

Run `python -m tests.benchmarks.peers.language` (`make bench-peers_language`). Model and windows are those of
`tests.benchmarks.smollm2`. All arms quantize the linear layers of the blocks, and every byte of them is counted; what
is left, the tied embedding above all, is in half precision. Methods that use data get each layer's inputs in the model
whose layers before it are quantized already. Ours in the same comparison: `bgd_plugin`. Since ours rotates the network,
the strongest peer gets the rotated network, too. Rows are kept in a JSON file, so that arms can be run one at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import CollectedInputs, Rerun, collect_batches
from bgd_plugin.graph import copy_module
from bgd_plugin.rotation import rotated
from tests.benchmarks.peers.build import PackedWeight, Quantizer
from tests.benchmarks.peers.frameworks import hqq, quanto
from tests.benchmarks.peers.grids import gptq, round_to_nearest
from tests.benchmarks.peers.language_page import FOLDER, Row, keep, plot, read, write_page
from tests.benchmarks.smollm2 import network, perplexity, text_windows

__all__ = ["PEERS", "compressed", "linear_layers"]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way of another library or paper.

    Attributes:
        method: arms of one method are a curve in the plot.
        quantizer: what it makes of a weight.
        has_inputs: whether it looks at the layer's inputs.
        is_rotated: whether it gets the network in this library's random basis, as QuaRot does it.
    """

    method: str
    quantizer: Quantizer
    has_inputs: bool = False
    is_rotated: bool = False


def _peers() -> dict[str, Peer]:
    peers = {}
    for bits in (2, 3):
        peers[f"RTN g32, {bits} bits"] = Peer(method="RTN g32", quantizer=round_to_nearest(bits))
        peers[f"HQQ g64, {bits} bits"] = Peer(method="HQQ g64", quantizer=hqq(bits))
        peers[f"GPTQ g32, {bits} bits"] = Peer(method="GPTQ g32", quantizer=gptq(bits), has_inputs=True)
        ordered = Peer(method=_BEST, quantizer=gptq(bits, by_activation=True), has_inputs=True, is_rotated=True)
        peers[f"{_BEST}, {bits} bits"] = ordered
    peers["optimum-quanto qint2"] = Peer(method="optimum-quanto", quantizer=quanto("qint2"))
    return peers


def _own(linear: bgd.LayerConfig) -> bgd.BGDConfig:
    return bgd.BGDConfig(linear=linear, embedding=None, max_divergence=None, rotation=True)


_BEST = "GPTQ g32 by activation, rotated"
PEERS = _peers()
_OWN: dict[str, bgd.BGDConfig] = {
    "bgd_plugin, trellis codes, 2 bits": _own(bgd.LayerConfig(codes="trellis")),
    "bgd_plugin, blocks of 4, k=256": _own(bgd.LayerConfig(block_size=4, codebook_size=256)),
    "bgd_plugin, blocks of 3, k=512": _own(bgd.LayerConfig(block_size=3, codebook_size=512)),
}


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


def _peer_row(name: str, model: Any, calibration: Sequence[Any], judging: Sequence[Tensor]) -> Row:
    peer = PEERS[name]
    start = time.process_time()
    basis = _in_random_basis(model, calibration) if peer.is_rotated else model
    student, size = compressed(basis, calibration, peer.quantizer, has_inputs=peer.has_inputs)
    seconds = time.process_time() - start
    rest = _round_the_rest_(student)
    row = {"arm": name, "method": peer.method, "bits": 8 * size / _weights(model), "bytes": size + 2 * rest}
    return row | {"perplexity": perplexity(student, judging), "cpu_seconds": seconds}


def _in_random_basis(model: nn.Module, calibration: Sequence[Any]) -> nn.Module:
    batches = collect_batches(calibration, model, device=torch.device("cpu"), forward=None)
    found = rotated(model, batches, seed=0)
    assert found.network is not None, found.note
    return found.network


@torch.no_grad()
def _round_the_rest_(student: nn.Module) -> int:
    """Round all but the linear layers' weights to half precision, as the file has it; returns how many numbers."""
    weights = {id(layer.weight) for layer in linear_layers(student).values()}
    state = {id(t): t for t in student.state_dict(keep_vars=True).values()}  # a tied weight once
    rest = [tensor for key, tensor in state.items() if key not in weights]
    for tensor in rest:
        tensor.copy_(tensor.half())
    return sum(tensor.numel() for tensor in rest)


def _own_row(name: str, model: Any, calibration: Sequence[Any], judging: Sequence[Tensor]) -> Row:
    start = time.process_time()
    result = bgd.load_adapter("transformers").quantize_pretrained(model, calibration, _OWN[name], progress=False)
    seconds = time.process_time() - start
    layers = result.report.layers
    assert sum(x.weights for x in layers) == _weights(model), "ours quantizes other layers than the peers"
    bits = sum(x.weights * x.bits_per_weight for x in layers) / _weights(model)
    row = {"arm": name, "method": name, "bits": bits, "bytes": result.report.compressed_bytes}
    return row | {"perplexity": perplexity(result.model, judging), "cpu_seconds": seconds}


def _weights(model: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in linear_layers(model).values())


def _float_row(model: nn.Module, judging: Sequence[Tensor]) -> Row:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    row = {"arm": "float", "method": "float", "bits": 32.0, "bytes": size, "cpu_seconds": 0.0}
    return row | {"perplexity": perplexity(model, judging)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    run: dict[str, Callable[..., Row]] = {**dict.fromkeys(PEERS, _peer_row), **dict.fromkeys(_OWN, _own_row)}
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers.language", description=main.__doc__)
    parser.add_argument("--arms", nargs="*", default=[""], help=f"beginnings of names, of {', '.join(run)}; none: plot")
    parser.add_argument("--text", type=Path, help="a text file or a folder of pages")
    parser.add_argument("--windows", type=int, default=8, help="that calibrate")
    parser.add_argument("--judging", type=int, default=8, help="windows that judge")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--json", type=Path, default=Path("runs/peers_language.json"), help="rows of all runs")
    parser.add_argument("--docs", action="store_true", help="keep the rows with the docs; write plot and table there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    path = FOLDER / "peers_language.json" if options.docs else options.json
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.arms:
        model, tokenizer = network()
        calibration, judging = text_windows(options, tokenizer)
        if not any(row["arm"] == "float" for row in read(path)):
            keep(path, _float_row(model, judging))
        for name in (name for name in run if any(name.startswith(arm) for arm in options.arms)):
            keep(path, run[name](name, model, calibration, judging))
    plot(read(path), path.with_suffix(".png"))
    if options.docs:
        write_page(read(path), FOLDER / "peers.md")


if __name__ == "__main__":
    main()
