"""Which rows of a layer's inputs the fit gets, and which judge it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.fitting import Skip
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.pq.blocks import Geometry
from bgd_plugin.support.seeds import seeded
from tests.fitting.literal import (
    close_to,
    fit_config,
    literal_of,
    rows_of,
    values_at,
)
from tests.networks import vectors


def test_few_rows_are_damped_up_to_the_mean_of_the_diagonal(fits: list[dict[str, Any]]) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    for rows, expected in ((5, 1.0), (64, 0.4), (640, 0.22)):
        bgd.quantize(model, [torch.randn(rows, 64)], fit_config(), progress=False)
        assert fits[-1]["damping"] == pytest.approx(expected)


def test_one_row_is_both_fitted_and_judged(fits: list[dict[str, Any]]) -> None:
    """Where nothing is left to be held out, the fit's own rows judge it."""
    bgd.quantize(
        nn.Sequential(nn.Linear(16, 32, bias=False)).eval(), [torch.randn(1, 16)], fit_config(), progress=False
    )
    assert torch.equal(fits[0]["gram"], fits[0]["heldout_gram"])


def test_each_layer_draws_its_own_random_numbers(fits: list[dict[str, Any]]) -> None:
    """The same whichever layers were done before, others for another layer or another seed."""
    twins = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).eval()
    twins[1].load_state_dict(twins[0].state_dict())
    data = vectors(2, features=16)

    def states(**fields: Any) -> list[Tensor]:
        fits.clear()
        bgd.quantize(twins, data, fit_config(**fields), progress=False)
        return [fit["generator"].get_state() for fit in fits]

    both, alone, other = states(), states(overrides=(("0", None),)), states(seed=1)
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(both[0], other[0]) and not torch.equal(both[1], other[1])


@pytest.mark.parametrize("batches", [1, 2, 3, 7])
def test_the_last_fifth_of_the_rows_is_held_out_wherever_a_batch_ends(fits: list[dict[str, Any]], batches: int) -> None:
    model, data = nn.Sequential(nn.Linear(12, 16)).eval(), vectors(batches, batch=20)
    bgd.quantize(model, data, fit_config(), progress=False)
    x = torch.cat(data).double()
    cut = 4 * len(x) // 5
    for name, rows in (("gram", x[:cut]), ("heldout_gram", x[cut:])):
        rows = rows - rows.mean(0)
        close_to(fits[0][name], (rows.T @ rows / len(rows))[None])


class _Attention(nn.Module):
    """Three layers on one and the same input, in a network that does not trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.q, self.k, self.v = nn.Linear(16, 24), nn.Linear(16, 32, bias=False), nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sigmoid(self.first(x))
        if bool(x.sum() < 0):
            return x
        return self.q(x) * self.v(x) + self.k(x)[:, :24]


def test_inputs_that_layers_share_are_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And with the same rows whichever of the layers comes first, drawn by the seed."""
    real, seen = full_gram._gathered, list[tuple[str, Tensor]]()

    def watched(context: Any, weight: Any, generator: torch.Generator) -> Any:
        seen.append((context.inputs.name, generator.get_state()))
        assert (weight is None) == (context.inputs.shared is not None)
        return real(context, weight, generator)

    monkeypatch.setattr(full_gram, "_gathered", watched)
    model = _Attention().eval()
    for seed in (0, 1, 0):
        bgd.quantize(model, vectors(5, batch=20), fit_config(seed=seed), progress=False)
    assert [name for name, _ in seen] == ["first", "q"] * 3 or [name for name, _ in seen] == ["q"] * 3
    first, second, third = (state for name, state in seen if name == "q")
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert torch.equal(first, seeded(0, "q inputs").get_state())


def test_layers_that_share_their_input_are_fitted_as_if_each_had_it_alone(fits: list[dict[str, Any]]) -> None:
    model, data = _Attention().eval(), vectors(5, batch=20)
    result = bgd.quantize(model, data, fit_config(), progress=False)
    names = [layer.name for layer in result.report.layers]
    assert set(names) >= {"q", "k", "v"}
    for name in ("q", "k", "v"):
        literal, fit = literal_of(result.model, model, name, data), fits[names.index(name)]
        assert float((literal.x - rows_of(values_at(model, name, data), model.q)).abs().max()) > 1e-3
        close_to(fit["weight"], literal.target(name != "k"))
        for found, expected in zip((fit["gram"], fit["heldout_gram"]), literal.grams(name != "k"), strict=True):
            close_to(found, expected)


class _Enough(Exception):
    """What was wanted has been seen."""


@pytest.mark.parametrize(
    ("columns", "expected"), [(64, 8192), (200, 12800), (600, 32768), (4096, 32768), (5000, 40000), (8192, 65536)]
)
def test_rows_are_sampled_by_the_number_of_columns(
    monkeypatch: pytest.MonkeyPatch, columns: int, expected: int
) -> None:
    def asked(inputs: Any, rows: int, *_: Any, **__: Any) -> Any:
        assert rows == expected
        raise _Enough

    monkeypatch.setattr(full_gram, "paired_pieces", asked)
    model = nn.Sequential(nn.Linear(columns, 8)).eval()
    with pytest.raises(_Enough):
        bgd.quantize(model, [torch.randn(2, columns)], fit_config(), progress=False)


def test_samples_that_are_kept_aside_are_not_fitted_to(fits: list[dict[str, Any]]) -> None:
    model, data = nn.Sequential(nn.Linear(12, 16)).eval(), vectors(5, batch=20)
    bgd.quantize(model, data, fit_config(kept_aside=0.2), progress=False)
    aside = {int((place + 0.5) * 5) for place in range(20)}
    x = torch.cat(data).double()[[i for i in range(100) if i not in aside]]
    cut = 64  # four fifths of 80
    for name, rows in (("gram", x[:cut]), ("heldout_gram", x[cut:])):
        rows = rows - rows.mean(0)
        close_to(fits[0][name], (rows.T @ rows / len(rows))[None])


def test_inputs_whose_squares_overflow_name_the_layer() -> None:
    model, data = nn.Sequential(nn.Linear(12, 64)).eval(), [1e25 * x for x in vectors(2)]
    with pytest.raises(bgd.BGDError, match=r"layer '0': its inputs on the calibration data contain .* or overflow"):
        bgd.quantize(model, data, fit_config(), progress=False)


@pytest.mark.parametrize("has_stream", [True, False])
def test_positions_count_relative_to_their_sum_in_both_parts(has_stream: bool) -> None:
    """In the rows that are fitted and in those that judge: by the stream plus the outputs, without the drift."""
    torch.manual_seed(0)
    theirs, stream, drift = ([torch.randn(20, 6) for _ in range(5)] for _ in range(3))
    mine = [x + 0.1 * torch.randn(20, 6) for x in theirs]
    stream = [x * torch.logspace(-1, 2, 20)[:, None] for x in stream]
    weight, gain = torch.randn(6, 6), torch.tensor([1.0, 2.0, 0.5, -1.0, 1.0, 3.0])
    layer: Any = SimpleNamespace(block_size=2)
    inputs = CollectedInputs("a", *([[(x, Geometry.linear())] for x in values] for values in (mine, theirs)))
    context = full_gram.LayerContext(
        layer=layer,
        weight=weight,
        inputs=inputs,
        has_batchnorm=False,
        has_bias=False,
        config=bgd.BGDConfig(),
        skip=Skip(drift=drift.__getitem__, gain=gain, stream=stream.__getitem__ if has_stream else None),
    )
    found = full_gram.FULL.collect(context, torch.Generator().manual_seed(0))
    x, outputs = torch.cat(mine).double(), torch.cat(theirs).double() @ weight.double().T
    energy = torch.stack([(s + t @ weight.T).double().square().mean(1) for s, t in zip(stream, theirs, strict=True)])
    level = energy.median(1, keepdim=True).values
    counts = 1 / (energy + level)
    counts = (counts / counts.mean(1, keepdim=True)).flatten() if has_stream else torch.ones(100).double()
    wanted = outputs + torch.cat(drift).double() * (gain / (gain.square() + 0.01 * gain.square().mean())).double()
    for moments, rows in ((found.fitted, slice(80)), (found.heldout, slice(80, None))):
        w = counts[rows, None] / counts[rows].sum()
        gram, cross = moments.around_zero()
        close_to(gram, (x[rows].T @ (w * x[rows]))[None])
        close_to(cross, (x[rows].T @ (w * wanted[rows]))[None])
        close_to(moments.mean, (w * x[rows]).sum(0)[None])
        close_to(moments.output_mean, (w * wanted[rows]).sum(0)[None])
    assert found.share == pytest.approx(float(counts[:80].sum() / counts.sum()))
    assert found.rows == pytest.approx(100)
