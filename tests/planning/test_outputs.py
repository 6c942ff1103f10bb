"""What outputs are, told by their values, and which loss a bound on the divergence stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin.planning.outputs import Information, Scale, logit_pair
from tests.networks import vectors

_LOGITS = 4 * torch.randn(64, 6, generator=torch.Generator().manual_seed(0))


def _parts(values: Any) -> list[Any]:
    return list(values.split(16))


@pytest.mark.parametrize(
    ("values", "measure"),
    [
        (_LOGITS, "KL"),
        (_LOGITS.softmax(1), "KL"),
        (1e-3 * _LOGITS, "squared difference"),  # random weights
        (functional.normalize(_LOGITS.repeat(1, 40)), "squared difference"),  # an embedding
        (0.2 * _LOGITS.sigmoid(), "squared difference"),  # scores of their own
        (_LOGITS[:, :1], "squared difference"),
        (_LOGITS[:, :, None, None], "squared difference"),
    ],
)
def test_what_tells_samples_apart_is_compared_as_logits(values: Tensor, measure: str) -> None:
    assert Scale.of(_parts(values)).measure == measure


def test_a_regression_in_a_field_named_logits_is_none() -> None:
    """Softmax over one class is 1, whatever the network answers."""
    assert Scale.of([{"logits": part} for part in _parts(_LOGITS[:, :1])]).measure == "squared difference"
    assert Scale.of([{"logits": part} for part in _parts(_LOGITS)]).measure == "KL"


def test_probabilities_are_compared_by_their_logarithms() -> None:
    found, exact = _LOGITS.softmax(1), (_LOGITS + 1e-3 * _LOGITS.square()).softmax(1)
    one, other = logit_pair(found, exact)
    torch.testing.assert_close(one.softmax(1), found)
    torch.testing.assert_close(other.softmax(1), exact)
    assert logit_pair(_LOGITS, _LOGITS)[0] is _LOGITS


def test_information_is_the_entropy_of_the_mean_less_the_mean_entropy() -> None:
    information = Information()
    for part in _parts(_LOGITS):
        information.add(part)
    p = _LOGITS.softmax(1)
    literal = -(p.mean(0) * p.mean(0).log()).sum() + (p * p.log()).sum(1).mean()
    assert math.isclose(information.nats, float(literal), rel_tol=1e-4)
    tokens = torch.zeros(8, 8, dtype=torch.bool)
    tokens[:, 0] = True
    few = Information()
    few.add(_LOGITS.unflatten(0, (8, 8)), tokens)
    assert few.answers == 8


def test_a_relative_error_counts_against_the_variance() -> None:
    """An answer around 40 whose spread is 1 is not kept by an error of a hundredth of 40."""
    values = torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
    assert Scale.of(_parts(values[:, :1])).tolerance == pytest.approx(0.1, rel=0.2)
    assert Scale.of(_parts(values[:, :1] + 40)).tolerance == pytest.approx(0.1 / 1600, rel=0.5)
    boxes = values.unflatten(0, (8, 8)) + torch.tensor([0.0, 10.0, 0.0])  # the last dimension holds the channels
    assert Scale.of([boxes]).tolerance == pytest.approx(0.1 * 3 / 103, rel=0.5)
    assert Scale.of([values[:2, :1] + 40]).tolerance == 0.1  # too few to tell
    assert Scale.of(_parts(_LOGITS)).tolerance == 1.0


@pytest.mark.parametrize("kind", ["embedding", "sigmoid", "regression"])
def test_outputs_that_are_no_logits_stay_near_the_float_networks(kind: str) -> None:
    """Softmax of them is next to the same for all samples, and its divergence tiny, whatever becomes of them."""
    torch.manual_seed(2)

    class Answers(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if kind == "regression":
                return 30 + x[:, :2]
            return functional.normalize(x) if kind == "embedding" else x.sigmoid()

    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), Answers())
    data = [3 * x for x in vectors(4, batch=32)]
    report = bgd.quantize(model.eval(), data, bgd.BGDConfig(rounds=1), progress=False).report
    with torch.no_grad():
        outputs = torch.cat([model(x) for x in data])
    assert report.answers is not None and report.answers.measure == "relative squared error"
    varying = float((outputs - outputs.mean(0)).square().sum() / outputs.square().sum())
    assert report.answers.divergence < 0.002 * varying
