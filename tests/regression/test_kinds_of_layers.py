"""Transposed convolutions and embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.pq.layout import from_transposed_matrix, transposed_matrix
from tests.networks import em, same_outputs
from tests.regression.fine import quantize_finely


def _up(kind: Any, dimensions: int, **fields: Any) -> tuple[nn.Module, list[Tensor]]:
    convs = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    model = nn.Sequential(convs[dimensions](3, 16, 1), nn.ReLU(), kind(16, 8, **fields))
    return model.eval(), [torch.randn(2, 3, *([5] * dimensions)) for _ in range(3)]


TRANSPOSED = [
    (nn.ConvTranspose1d, 1, {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, 2, {"kernel_size": 2, "stride": 2}),
    (nn.ConvTranspose2d, 2, {"kernel_size": 3, "groups": 2, "padding": 1, "dilation": 2, "bias": False}),
    (nn.ConvTranspose3d, 3, {"kernel_size": (1, 2, 3), "stride": (1, 2, 2)}),
]


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize(("kind", "dimensions", "fields"), TRANSPOSED)
def test_transposed_convolutions(kind: Any, dimensions: int, fields: Any, method: Any, tmp_path: Path) -> None:
    model, data = _up(kind, dimensions, **fields)
    result = quantize_finely(model, data, em(method=method))
    (layer,) = result.report.layers
    assert (layer.kind, layer.block_size) == (f"conv_transpose{dimensions}d", 4)
    assert 0 < layer.relative_error < 1
    bgd.save(result.model, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    assert bgd.plan(model, em()).compressed_bytes == result.report.compressed_bytes
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=model), data)
    dense: Any = bgd.materialize(result.model)
    assert type(dense.get_submodule("2")) is kind
    assert same_outputs(result.model, dense, data)


def test_the_error_of_a_transposed_convolution_without_overlap_is_that_of_its_output() -> None:
    model, data = _up(nn.ConvTranspose2d, 2, kernel_size=2, stride=2, bias=False)
    result = quantize_finely(model, data)
    with torch.no_grad():
        exact, out = (torch.cat([net(x) for x in data]) for net in (model, result.model))
    expected = float((exact - out).square().sum() / exact.square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-4)


def test_the_matrix_of_a_transposed_convolution_and_back() -> None:
    weight = torch.randn(6, 4, 2, 3)
    matrix = transposed_matrix(weight, 2)
    assert matrix.shape == (2 * 4 * 6, 3)
    assert torch.equal(matrix[4 * 6 + 2 * 6 + 1 * 3 + 2], weight[3:, 2, 1, 2])  # group 1, channel 2, offset (1, 2)
    assert torch.equal(from_transposed_matrix(matrix, weight.shape, 2), weight)


class Language(nn.Module):
    """An embedding whose weight the last layer may share."""

    def __init__(self, tied: bool, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.embed, self.middle = nn.Embedding(40, 16, padding_idx=0), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.embed(ids)))
        if self.branch and x.sum() < -1e9:
            return x
        return self.head(x)


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_quantized_when_asked_for(tied: bool, branch: bool, method: Any, tmp_path: Path) -> None:
    model = Language(tied, branch).eval()
    data = [torch.randint(0, 40, (2, 9)) for _ in range(3)]
    skipped = {s.name: s.reason for s in bgd.plan(model, em()).skipped}
    assert skipped == ({"head": "embedding=None (tied to embed)"} if tied else {"embed": "embedding=None"})
    config = em(method=method, embedding=LayerConfig(block_size=4, codebook_size=32))
    result = quantize_finely(model, data, config)
    names = {"middle", "head"} if tied else {"embed", "middle", "head"}
    assert {x.name for x in result.report.layers} == names
    assert bgd.plan(model, config).compressed_bytes == result.report.compressed_bytes
    bgd.save(result.model, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=Language(tied, branch).eval())
    assert (loaded.embed.codebook is loaded.head.codebook) is tied
    assert same_outputs(result.model, loaded, data)
    dense: Any = bgd.materialize(loaded)
    assert (dense.embed.weight is dense.head.weight) is tied
    assert same_outputs(result.model, dense, data)


def test_an_embedding_decodes_the_rows_of_its_weight() -> None:
    config = em(embedding=LayerConfig(block_size=4, codebook_size=32))
    embed: Any = quantize_finely(Language(False, False), [torch.randint(0, 40, (2, 9))], config).model.embed
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(embed(ids), embed.weight[ids])
