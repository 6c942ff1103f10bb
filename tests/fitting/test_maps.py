"""Where all positions of a convolution are taken, its moments come from the inputs' maps, and are those of its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.fitting import method_full_gram
from bgd_plugin.pq.blocks import Geometry
from bgd_plugin.pq.gram import MomentSums
from bgd_plugin.pq.maps import Maps


def _network() -> tuple[nn.Sequential, list[Tensor]]:
    torch.manual_seed(0)
    layers = [nn.Conv2d(c, 16, 3, padding=1, bias=False) for c in (3, 16)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()
    return model, [torch.randn(32, 3, 6, 6) for _ in range(4)]


def _quantized() -> None:
    nine, four = (bgd.LayerConfig(block_size=size, codebook_size=16) for size in (9, 4))
    config = bgd.BGDConfig(first_layer=nine, conv=nine, pointwise_conv=four, max_divergence=None)
    model, data = _network()
    bgd.quantize(model, data, config, progress=False)


def test_a_fit_gets_the_grams_of_the_rows(fits: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Maps] = []
    add = MomentSums.add_maps_
    monkeypatch.setattr(MomentSums, "add_maps_", lambda s, maps, y: (taken.append(maps), add(s, maps, y))[1])
    _quantized()
    assert {maps.columns for maps in taken} == {27, 144}
    monkeypatch.setattr(Maps, "of", lambda *_, **__: None)
    _quantized()
    by_maps, by_rows = fits[: len(fits) // 2], fits[len(fits) // 2 :]
    assert len(by_maps) == 3
    for mine, theirs in zip(by_maps[:2], by_rows[:2], strict=True):  # the third one's inputs have other codes before it
        for name in ("weight", "gram", "heldout_gram"):
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_piece_that_is_split_is_split_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four fifths of three pieces: the last but one is fitted in part."""
    counts: dict[str, list[int]] = {"maps": [], "rows": []}
    add, add_maps = MomentSums.add_, MomentSums.add_maps_

    def rows_added(sums: MomentSums, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        counts["rows"].append(inputs.shape[1])
        add(sums, inputs, outputs, weights)

    def maps_added(sums: MomentSums, maps: Maps, outputs: Tensor) -> None:
        counts["maps"].append(maps.positions)
        add_maps(sums, maps, outputs)

    monkeypatch.setattr(MomentSums, "add_", rows_added)
    monkeypatch.setattr(MomentSums, "add_maps_", maps_added)
    model, data = _network()
    geometry = Geometry.of((3, 3), 1, 1, 1, 1)
    calls = [[(x[:10], geometry)] for x in data[:3]]
    inputs = CollectedInputs("layer", calls, calls)
    outputs = [model[0](x[:10]).detach() for x in data[:3]]
    monkeypatch.setattr(CollectedInputs, "outputs", outputs.__getitem__)
    weight = model[0].weight.detach()
    context: Any = _Context(weight=weight, inputs=inputs)
    found = method_full_gram._gathered(context, weight, torch.Generator())
    assert counts == {"maps": [360, 360], "rows": [0, 0, 144, 216]}
    assert (found.rows, found.share) == (1080, 864 / 1080)
    exact = torch.nn.functional.unfold(torch.cat([x[:10] for x in data[:3]]), 3, padding=1).mT.reshape(-1, 27)
    for moments, rows in ((found.fitted, exact[:864]), (found.heldout, exact[864:])):
        torch.testing.assert_close(moments.covariance[0], torch.cov(rows.mT, correction=0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(moments.output_mean[0].float(), (rows @ weight.flatten(1).mT).mean(0))


class _Context:
    """What is read of a layer's context."""

    skip = None

    def __init__(self, weight: Tensor, inputs: CollectedInputs) -> None:
        self.weight, self.inputs = weight, inputs
