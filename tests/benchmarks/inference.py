"""Time of inference on a CPU: quantized layers and networks through the kernels, on the plain path, beside others.

Run `python -m tests.benchmarks.inference` (`make bench-inference`). All arms of a subject take turns in one process.
An arm's time is the quickest eighth of its turns, since whatever else the machine does only adds time; the spread is
that of the ratios to float in the same turn. Weights are quantized without data and by one round of k-means
(`quantize_weights`, blocks of 4 and 256 codewords unless said): other codes are as fast. `--trellis` gives linear
layers trellis codes instead. `--clock cpu` counts the process's CPU-seconds instead of the wall clock. A linear layer
runs as in a network, one of eight in a turn: each finds Python's code in the caches, and its own weights in memory.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import kernels
from bgd_plugin.nn import PQLinear, quantized
from bgd_plugin.pq.windows import code_bytes_per_column
from bgd_plugin.support.tables import table
from tests.benchmarks.inference_networks import NETWORKS

Arm = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How an arm compares with float."""

    subject: str
    arm: str
    milliseconds: float
    ratio: float
    """Float's time over this arm's: above 1 is faster than float."""
    low: float
    """The quartiles of the ratios in the same turn."""
    high: float


def compare(
    subject: str, arms: dict[str, Arm], rounds: int, clock: Callable[[], float], calls: int = 1, layers: int = 1
) -> list[Timing]:
    """Let the arms take turns, and compare each with the arm "float".

    Args:
        subject: what is timed.
        arms: by name, what to call; "float" among them.
        rounds: of all arms.
        clock: in seconds.
        calls: of an arm in its turn. One finds what the arms before it have left in the caches.
        layers: that an arm runs in a call; times are of one of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, call in arms.items():
            start = clock()
            for _ in range(calls):
                call()
            if number:  # the first turn compiles and measures
                seconds[name].append((clock() - start) / (calls * layers))
    found, quickest = [], {name: sorted(values)[len(values) // 8] for name, values in seconds.items()}
    for name, values in seconds.items():
        ratios = [base / own for base, own in zip(seconds["float"], values, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found.append(
            Timing(
                subject=subject,
                arm=name,
                milliseconds=1e3 * quickest[name],
                ratio=quickest["float"] / quickest[name],
                low=low,
                high=high,
            )
        )
    return found


def layer_arms(size: int, block_size: int | None, batch: int, layers: int) -> dict[str, Arm]:
    """Square linear layers, one after another: float, quantized through the kernels, plainly.

    Args:
        size: inputs and outputs of a layer.
        block_size: None: trellis codes.
        batch: inputs at once.
        layers: number of them, each with weights of its own, all with the same input.
    """
    dense = [nn.Linear(size, size).eval() for _ in range(layers)]
    coded = [_coded(layer, block_size) for layer in dense]
    x = torch.randn(batch, size)

    def run(layers: list[Any]) -> None:
        for layer in layers:
            layer(x)

    def plain() -> None:
        with kernels.disabled():
            run(coded)

    return {"float": lambda: run(dense), "kernels": lambda: run(coded), "plain": plain}


def _coded(dense: nn.Linear, block_size: int | None) -> PQLinear:
    """A layer of the same size with random codes."""
    rows, size = dense.weight.shape
    if block_size is None:
        codes = torch.randint(0, 256, (code_bytes_per_column(rows), size), dtype=torch.uint8)
        layer = quantized(dense, torch.rand(rows), codes, form="trellis").eval()
    else:
        layer = quantized(dense, torch.randn(256, block_size), torch.randint(0, 256, (rows, size // block_size)))
    assert isinstance(layer, PQLinear)
    return layer


def network_arms(model: nn.Module, inputs: Any, others: bool, codes: str) -> dict[str, Arm]:
    """A network in float, through the kernels and on the plain path; with `others`, as other tools run it."""
    linear = bgd.LayerConfig(block_size=4) if codes == "blocks" else bgd.LayerConfig(codes=codes)
    config = bgd.BGDConfig(conv=bgd.LayerConfig(block_size=9), linear=linear, max_divergence=None, em_iterations=1)
    small = _loaded(bgd.quantize_weights(model, config).model, model)
    arms: dict[str, Arm] = {
        "float": _call(model, inputs),
        "kernels": _call(small, inputs),
        "plain": _plain(small, inputs),
    }
    if others:
        arms["float, torch.compile"] = _call(torch.compile(model), inputs)
        arms["kernels, torch.compile"] = _call(torch.compile(small), inputs)
        if isinstance(inputs, Tensor) and inputs.is_floating_point():
            arms["exported, onnxruntime"] = _onnxruntime(small, inputs)
        arms["optimum-quanto, 4 bits"] = _quanto(model, inputs)
    return arms


def _loaded(small: nn.Module, model: nn.Module) -> nn.Module:
    """The compressed network as its users have it: read from its file."""
    with tempfile.TemporaryDirectory() as folder:
        bgd.save(small, Path(folder) / "net.safetensors")
        return bgd.load(Path(folder) / "net.safetensors", like=model.eval())


def _call(model: Any, inputs: Any) -> Arm:
    return (lambda: model(**inputs)) if isinstance(inputs, dict) else (lambda: model(inputs))


def _plain(model: nn.Module, inputs: Any) -> Arm:
    call = _call(model, inputs)

    def arm() -> Any:
        with kernels.disabled():
            return call()

    return arm


def _quanto(model: nn.Module, inputs: Any) -> Arm:
    """The same network with optimum-quanto's 4-bit weights, as it computes with them on a CPU."""
    from optimum import quanto

    other = copy.deepcopy(model)
    quanto.quantize(other, weights=quanto.qint4)
    quanto.freeze(other)
    return _call(other, inputs)


def _onnxruntime(model: nn.Module, x: Tensor) -> Arm:
    """The exported file, in a session with as many threads as torch has."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "net.onnx"
        bgd.export(model, file, (x,))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def timings(options: Any) -> Iterator[list[Timing]]:
    """All subjects that were asked for, one after another."""
    clock = CLOCKS[options.clock]
    if "layers" in options.subjects:
        for block_size in (None,) if options.trellis else (4, 8):
            for batch in (1, 8, 64, 512):
                form = f"d={block_size}" if block_size else "trellis"
                name = f"linear {options.size}x{options.size}, {form}, batch {batch}"
                rounds = options.rounds if batch < 64 else max(3, options.rounds // 4)
                arms = layer_arms(options.size, block_size, batch, options.layers)
                yield compare(name, arms, rounds, clock, options.calls, options.layers)
    for name, build in NETWORKS.items():
        if name in options.subjects:
            model, subjects = build()
            for said, inputs in subjects:
                arms = network_arms(model, inputs, options.others, "trellis" if options.trellis else "blocks")
                yield compare(f"{name}, {said}", arms, options.rounds, clock, options.calls)
                gc.collect()


def main() -> None:
    """Print a table, and with `--json` write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subjects", nargs="+", default=["layers", *NETWORKS], choices=["layers", *NETWORKS])
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of the layers")
    parser.add_argument("--layers", type=int, default=8, help="linear layers that run one after another in a turn")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--calls", type=int, default=1, help="of each arm in its turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--others", action="store_true", help="torch.compile, onnxruntime and optimum-quanto, too")
    parser.add_argument("--trellis", action="store_true", help="linear layers with trellis codes")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: list[Timing] = []
    with torch.no_grad():
        for part in timings(options):
            found += part
            for row in part:
                print(f"{row.subject}: {row.arm} {row.milliseconds:.2f} ms, {row.ratio:.2f}x", flush=True)
    rows = [(t.subject, t.arm, f"{t.milliseconds:.2f}", f"{t.ratio:.2f}", f"{t.low:.2f}-{t.high:.2f}") for t in found]
    print(table(("subject", "arm", "ms", "times float", "quartiles"), rows))
    if options.json:
        options.json.write_text(json.dumps([vars(t) for t in found], indent=1))


if __name__ == "__main__":
    main()
