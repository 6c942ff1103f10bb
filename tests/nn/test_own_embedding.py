"""Embeddings whose class has a forward of its own: it runs on decoded rows."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.nn import PQEmbedding

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


class Scaled(nn.Embedding):
    """Rows times a factor, as in Gemma and BART."""

    def __init__(self, *sizes: int, factor: float = 8.0) -> None:
        super().__init__(*sizes)
        self.register_buffer("factor", torch.tensor(factor), persistent=False)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.factor.to(self.weight.dtype)


class Offset(nn.Embedding):
    """Positions, shifted, as in BART and OPT; more arguments than an embedding has."""

    def forward(self, input: Tensor, past: int = 0) -> Tensor:
        return super().forward(torch.arange(input.shape[1]) + past + 2)


class WithItsMean(nn.Embedding):
    """Reads the whole table beside its rows."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) - self.weight.mean(0)


class Twice(Scaled):
    """A subclass of such a subclass."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Model(nn.Module):
    """An embedding, and a head that may share its weight."""

    def __init__(self, kind: type[nn.Embedding], *, tied: bool, traced: bool) -> None:
        super().__init__()
        self.embed, self.head, self.traced = kind(40, 16), nn.Linear(16, 40, bias=False), traced
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, input: Tensor) -> Tensor:
        if not self.traced and float(input.sum()) < 0:
            return input
        return self.head(self.embed(input).relu())


def quantized(model: nn.Module) -> Any:
    layer = bgd.LayerConfig(block_size=4, codebook_size=16)
    config = bgd.BGDConfig(max_divergence=None, embedding=layer, linear=layer)
    return bgd.quantize(model, [IDS, IDS + 7, IDS + 20], config, progress=False)


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", [Scaled, Offset, WithItsMean, Twice])
def test_its_forward_runs_on_decoded_rows(kind: type[nn.Embedding], *, tied: bool, traced: bool) -> None:
    torch.manual_seed(0)
    model = Model(kind, tied=tied, traced=traced).eval()
    result = quantized(model)
    embed = result.model.embed
    assert not result.report.skipped
    assert isinstance(embed, PQEmbedding)
    assert isinstance(embed, kind)
    literal = copy.deepcopy(model.embed)
    literal.weight = nn.Parameter(embed.weight.detach())
    torch.testing.assert_close(embed(IDS), literal(IDS))
    assert "embed.weight" not in result.model.state_dict()
    if tied:
        assert result.model.head.codes is embed.codes
    back = bgd.materialize(copy.deepcopy(result.model))
    assert type(back.embed) is kind
    torch.testing.assert_close(back(IDS), result.model(IDS))


@pytest.mark.parametrize("kind", [Scaled, Offset, Twice])
def test_copied_pickled_saved_and_loaded(kind: type[nn.Embedding], tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Model(kind, tied=True, traced=True).eval()
    student = quantized(model).model
    wanted = student(IDS)
    assert torch.equal(copy.deepcopy(student)(IDS), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(student))(IDS), wanted)
    bgd.save(student, tmp_path / "net.safetensors")
    assert torch.equal(bgd.load(tmp_path / "net.safetensors", like=model)(IDS), wanted)


def test_trains() -> None:
    torch.manual_seed(0)
    student = quantized(Model(Scaled, tied=False, traced=True)).model
    student(IDS).sum().backward()
    assert student.embed.codebook.grad.abs().sum() > 0


def test_a_forward_replaced_on_the_instance_stays_float() -> None:
    torch.manual_seed(0)
    model = Model(nn.Embedding, tied=False, traced=True).eval()
    model.embed.forward = lambda input: 3 * nn.functional.embedding(input, model.embed.weight)
    result = quantized(model)
    assert type(result.model.embed) is nn.Embedding
    torch.testing.assert_close(result.model.embed(IDS), model.embed(IDS), rtol=1e-3, atol=1e-3)  # half precision
