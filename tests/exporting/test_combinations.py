"""Every kind of layer with every width of codes, mask, storage and norm: exported, the network answers as before."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.nn import FrozenNorm, quantized

_SIZES = (2, 3, 16, 21, 64, 100, 256, 300, 512, 2048)
_MASKS = ("none", "2:4", "some zeros", "many zeros", "whole rows")
_STORAGES = ("int8", "float16", "float32")
_NORMS = (nn.BatchNorm2d, FrozenNorm)


def _mask(kind: str, shape: torch.Size) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "whole rows":
        return (torch.rand(shape[0]) < 0.7).reshape(-1, *(1 for _ in shape[1:])).expand(shape).clone()
    if kind == "2:4" and shape[1:].numel() % 4 == 0:
        scores = torch.rand(shape).reshape(-1, 4)
        return torch.zeros_like(scores).scatter_(1, scores.topk(2).indices, 1.0).bool().reshape(shape)
    return torch.rand(shape) < (0.995 if kind == "some zeros" else 0.5)


def _layer(choose: random.Random, layer: Any, block_size: int) -> Any:
    """A layer with random codes; how many, of what storage, and which of its weights are zero is chosen."""
    size = choose.choice(_SIZES)
    is_transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d))
    shape = layer.weight.shape
    if is_transposed:  # as the layer's matrix is laid out
        shape = torch.Size((shape[1:].numel() * layer.groups, shape[0] // layer.groups))
    codes = torch.randint(size, (shape[0], layer.weight.numel() // shape[0] // block_size))
    mask = None if isinstance(layer, nn.Embedding) else _mask(choose.choice(_MASKS), shape)
    result = quantized(layer, torch.randn(size, block_size) * 0.2, codes, mask)
    storage = choose.choice(_STORAGES)
    if storage != "float32":
        result.round_codebook_(storage)
    return result


class Pictures(nn.Module):
    """Convolutions of all kinds, norms, and linear layers two of which share their tensors."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.wide = _layer(choose, nn.Conv2d(16, 16, 3, padding=1), 9)
        kind = choose.choice(_NORMS)
        self.norm = FrozenNorm(torch.rand(16), torch.rand(16)) if kind is FrozenNorm else nn.BatchNorm2d(16)
        self.depthwise = _layer(choose, nn.Conv2d(16, 16, 3, padding=1, groups=16), 3)
        self.point = _layer(choose, nn.Conv2d(16, 32, 1, bias=False), choose.choice([1, 4]))
        self.up = _layer(choose, nn.ConvTranspose2d(32, 16, 2, stride=2, groups=choose.choice([1, 2])), 4)
        self.last = _layer(choose, nn.Linear(16, 24), 4)
        self.again = nn.Linear(16, 24)
        if choose.random() < 0.5:
            self.again = quantized(self.again, self.last.codebook, self.last.codes, self.last.mask)
            self.again.codebook, self.again.codes = self.last.codebook, self.last.codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.norm(self.wide(self.stem(x))))
        x = torch.relu(self.up(self.point(x + self.depthwise(x)))).mean((2, 3))
        return self.last(x), self.again(x)


class Words(nn.Module):
    """An embedding with a head that may be tied to it, an attention, and a convolution over the sequence."""

    def __init__(self, choose: random.Random) -> None:
        super().__init__()
        self.words = _layer(choose, nn.Embedding(60, 16), choose.choice([2, 4, 8]))
        self.places = nn.Embedding(7, 16)
        self.mix = _layer(choose, nn.Conv1d(16, 16, 3, padding=1), 3)
        self.project = _layer(choose, nn.Linear(16, 48), 4)
        self.head = _layer(choose, nn.Linear(16, 60), 4)
        if choose.random() < 0.5:
            self.head = quantized(nn.Linear(16, 60), self.words.codebook, self.words.codes)
            self.head.codebook, self.head.codes = self.words.codebook, self.words.codes

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.places.weight
        x = torch.tanh(self.mix(x.transpose(1, 2)).transpose(1, 2))
        query, key, value = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        x = nn.functional.scaled_dot_product_attention(query, key, value)
        return {"scores": self.head(x.squeeze(1))}


_NETWORKS = {
    "pictures": (Pictures, lambda: torch.randn(2, 3, 16, 16)),
    "words": (Words, lambda: torch.randint(60, (2, 7))),
}


def _check(kind: str, number: int, suffix: str, folder: Path) -> None:
    build, inputs = _NETWORKS[kind]
    torch.manual_seed(number)
    choose = random.Random(number)
    network, example = build(choose).eval(), inputs()
    if choose.random() < 0.5:
        bgd.save(network, folder / "net.safetensors")
        network = bgd.load(folder / "net.safetensors", like=bgd.materialize(network))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    done = bgd.export(network, folder / f"net{suffix}", example, dynamic=choose.random() < 0.7)
    assert done.largest_difference is not None
    assert done.largest_difference < 2e-5
    assert done.is_folded == (suffix == ".onnx")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("kind", _NETWORKS)
def test_onnx(kind: str, number: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    _check(kind, number, ".onnx", tmp_path)


@pytest.mark.parametrize("kind", _NETWORKS)
def test_pt2(kind: str, tmp_path: Path) -> None:
    _check(kind, 0, ".pt2", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", _NETWORKS)
def test_many_combinations_in_onnx(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    for number in range(2, 40):
        _check(kind, number, ".onnx", tmp_path)
