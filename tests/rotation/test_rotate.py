"""Rotations that fold: the same answers from other weights, in all that fold and in nothing else."""

import functools

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.nn import RotatedNorm
from bgd_plugin.rotation import rotated
from tests.rotation.networks import WIDTH, Model, RMSNorm, layer_norm, words

KINDS = {
    "rms, tied": functools.partial(Model),
    "rms, untied": functools.partial(Model, tied=False),
    "rms, shared values": functools.partial(Model, shared_values=True, bias=True),
    "one plus weight": functools.partial(Model, functools.partial(RMSNorm, one_plus=True)),
    "layer norm, tied": functools.partial(Model, layer_norm, bias=True),
    "layer norm, untied": functools.partial(Model, layer_norm, tied=False, bias=True),
}


def batches(count: int = 3) -> list[Batch]:
    torch.manual_seed(1)
    return [Batch(args=(words(),)) for _ in range(count)]


def built(kind: str) -> Model:
    torch.manual_seed(0)
    return KINDS[kind]().eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_stay_and_the_weights_change(kind: str) -> None:
    model = built(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = rotated(model, batches(), 0)
    assert result.network is not None, result.note
    assert "residual stream of 16 features with 5 norms" in result.note
    assert "the values of 2 attention layers" in result.note
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(result.network) is Model
    new = dict(result.network.named_parameters())
    changed = {name for name, value in model.named_parameters() if name in new and not torch.allclose(value, new[name])}
    for part in ("embed.weight", "positions", "blocks.1.v.weight", "blocks.0.o.weight", "blocks.0.down.weight"):
        assert part in changed
    batch = batches()[2]  # one that the comparison has not seen
    wanted = batch.call(model)
    assert (batch.call(result.network) - wanted).norm() < 2e-3 * wanted.norm()  # the matrix is rounded


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_stays_only_before_a_tied_head(kind: str) -> None:
    network = rotated(built(kind), batches(), 0).network
    assert network is not None
    stays = [path for path, module in network.named_modules() if isinstance(module, RotatedNorm)]
    is_tied = network.head.weight is network.embed.weight  # type: ignore[union-attr]
    assert stays == (["norm"] if is_tied else [])


def test_gains_are_folded() -> None:
    network = rotated(built("layer norm, untied"), batches(), 0).network
    assert network is not None
    norms = [module for module in network.modules() if isinstance(module, nn.LayerNorm)]
    assert all(bool((norm.weight == 1).all()) and bool((norm.bias == 0).all()) for norm in norms)


def test_outlying_columns_are_spread() -> None:
    model = built("rms, untied")
    with torch.no_grad():
        model.blocks[0].q.weight[:, 3] *= 30  # type: ignore[union-attr, index]
    network = rotated(model, batches(), 0).network
    assert network is not None

    def spread(weight: Tensor) -> float:
        columns = weight.detach().square().sum(0)
        return float(columns.max() / columns.mean())

    old, new = (m.blocks[0].q.weight for m in (model, network))  # type: ignore[union-attr, index]
    assert spread(old) > 10
    assert spread(new) < 5


def test_the_seed_decides() -> None:
    model = built("rms, tied")
    one, same, other = (rotated(model, batches(), seed).network for seed in (0, 0, 1))
    assert one is not None and same is not None and other is not None
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.allclose(one.embed.weight, other.embed.weight)  # type: ignore[arg-type]


class Scaled(Model):
    """Multiplies its residual stream by a factor of each feature's own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks[0](self.embed(x) * self.factor)))  # type: ignore[no-any-return]


class Deciding(Model):
    """Looks at a single feature of its residual stream: no run over other data shows it."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.blocks[0](h)
        if float(h[0, 0, 0]) > 0:
            h = self.blocks[1](h)
        return self.head(self.norm(h))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", [Scaled, Deciding])
def test_what_does_not_fold_is_not_rotated(kind: type[Model]) -> None:
    torch.manual_seed(0)
    result = rotated(kind().eval(), batches(), 0)
    if result.network is not None:  # the values of attention fold all the same
        assert "residual stream" not in result.note
        assert "values of" in result.note
    else:
        assert result.note.startswith("rotation: none, since")


def test_a_network_without_norms_is_left_without_a_word() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    result = rotated(model, [Batch(args=(torch.randn(2, 3, 8, 8),))], 0)
    assert result.network is None
    assert result.note == ""


def test_a_network_that_fails_is_not_rotated() -> None:
    result = rotated(built("rms, tied"), [Batch(args=(torch.full((1, 6), 1000),))], 0)
    assert result.network is None
    assert "could not be followed" in result.note
