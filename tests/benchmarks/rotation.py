"""What rotations bring: the first blocks of SmolLM2-135M at 2 bits, with and without, in a few CPU-minutes.

Run `python -m tests.benchmarks.rotation`. Model and text are those of `tests.benchmarks.smollm2`, the text's paragraphs
alone. The first blocks are compressed as a network of their own; the float rest of the model then reads what they give.
Told are the divergence of the model's words and the relative error of the residual stream, on windows unseen by
the fit.
"""

import argparse
import copy
import html
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bgd_plugin as bgd
from tests.benchmarks.smollm2 import HANDBOOK, network

LENGTH = 512
JUDGES = 8


def paragraphs(folder: Path) -> str:
    """The paragraphs of the handbook's pages."""
    found = []
    for page in sorted(folder.glob("*.html")):
        for part in re.findall(r'(?s)<p[ >].*?</p>|<div class="para">.*?</div>', page.read_text()):
            text = " ".join(html.unescape(re.sub(r"(?s)<[^>]+>", "", part)).split())
            found += [text] if len(text) > 80 else []
    return "\n".join(found)


def first_blocks(model: Any, count: int) -> Any:
    """The model's first blocks, with its embedding, norm and head."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = count
    small = type(model)(config).eval()
    state = small.state_dict()
    small.load_state_dict({name: value for name, value in model.state_dict().items() if name in state})
    small.tie_weights()
    return small


def stream(model: Any, window: Tensor) -> Tensor:
    """The residual stream behind a model's last block, back in the embedding's own basis."""
    found: list[Any] = []
    hook = model.model.layers[-1].register_forward_hook(lambda _module, _args, output: found.append(output))
    model(input_ids=window, use_cache=False)
    hook.remove()
    return found[0] if isinstance(found[0], Tensor) else found[0][0]


def words(model: Any, blocks: int, values: Tensor, window: Tensor) -> Tensor:
    """Log probabilities that the float rest of the model gives to what its first blocks give."""
    layers = model.model.layers
    for layer in layers[:blocks]:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    hook = layers[blocks].register_forward_pre_hook(
        lambda _, args, kwargs: ((values, *args[1:]), kwargs), with_kwargs=True
    )
    try:
        logits: Tensor = model(input_ids=window, use_cache=False).logits
    finally:
        hook.remove()
        for layer in layers[:blocks]:
            del layer.forward
    return logits.log_softmax(-1)


def judged(model: Any, exact: Any, compressed: Any, windows: Sequence[Tensor]) -> tuple[float, float]:
    """Divergence of the words in nats, and relative squared error of the residual stream."""
    before, after = (m.model.embed_tokens.weight[:4000] for m in (exact, compressed))
    back = torch.linalg.lstsq(before, after).solution.T
    blocks = len(exact.model.layers)
    divergence = lost = kept = 0.0
    for window in windows:
        wanted, found = stream(exact, window), stream(compressed, window) @ back
        lost += float((found - wanted)[:, 1:].square().sum())  # the first token's stream dwarfs all others'
        kept += float(wanted[:, 1:].square().sum())
        log_p, log_q = (words(model, blocks, values, window) for values in (wanted, found))
        divergence += float((log_p.exp() * (log_p - log_q)).sum()) / LENGTH / len(windows)
    return divergence, lost / kept


def bits(report: Any) -> float:
    """Per weight of the quantized layers, codebooks included."""
    total = sum(layer.weights for layer in report.layers)
    return float(sum(layer.weights * layer.bits_per_weight for layer in report.layers) / total)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.rotation", description=main.__doc__)
    parser.add_argument("--text", type=Path, default=Path(HANDBOOK), help="the handbook's folder of pages")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--trellis", action="store_true", help="trellis codes in place of blocks")
    parser.add_argument("--windows", type=int, default=6, help="that calibrate")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, tokenizer = network()
    tokens = tokenizer(paragraphs(options.text), return_tensors="pt").input_ids[0]
    windows = tokens[: len(tokens) // LENGTH * LENGTH].reshape(-1, 1, LENGTH)
    last = len(windows) - JUDGES
    calibration = [{"input_ids": w} for w in windows[:last][:: last // options.windows][: options.windows]]
    judges = list(windows[last::4])
    small = first_blocks(model, options.blocks)
    for rotation in (False, True):
        blocks = bgd.LayerConfig(block_size=4, codebook_size=256)
        linear = bgd.LayerConfig(codes="trellis") if options.trellis else blocks
        config = bgd.BGDConfig(linear=linear, overrides=(("lm_head", None),), kept_aside=0.0, rotation=rotation)
        start = time.process_time()
        result = bgd.load_adapter("transformers").quantize_pretrained(small, calibration, config, progress=False)
        seconds = time.process_time() - start
        divergence, error = judged(model, small, result.model, judges)
        print(
            f"rotation={rotation}: {bits(result.report):.3f} bits per weight, divergence {divergence:.4f} nats, ",
            end="",
        )
        print(f"residual stream off by {error:.4f} of its square, {seconds:.0f} CPU-seconds", flush=True)
        print("; ".join(note for note in result.report.notes if "rotation" in note))


if __name__ == "__main__":
    main()
