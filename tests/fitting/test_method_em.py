"""The paper's fit of one weight: what reaches EM, and what the layer gets back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.fitting import fit_weight, method_em
from bgd_plugin.fitting.trellis_windows import fit_windows
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.pq.blocks import to_blocks
from bgd_plugin.pq.em import fit_em
from bgd_plugin.pq.masked import fit_em_masked
from tests.networks import em, randomized, vectors


def _layer(**fields: Any) -> PlannedLayer:
    common = {"name": "a", "target": "a", "kind": "linear", "family": "linear", "calls": ("a",)}
    return PlannedLayer(**(common | {"weight_shape": (64, 16), "block_size": 4, "codebook_size": 16} | fields))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _case() -> tuple[Tensor, Tensor]:
    weight, x = torch.randn(64, 16), torch.randn(40, 4)
    return weight, x.T @ x


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("iterations", [1, 20])
@pytest.mark.parametrize("is_masked", [False, True])
def test_every_argument_reaches_the_fit_and_the_codebook_is_rounded(
    storage: str, iterations: int, is_masked: bool
) -> None:
    weight, gram = _case()
    mask = torch.rand(64, 16) > 0.4 if is_masked else None
    layer = _layer(codebook_storage=storage, block_size=4, codebook_size=32)
    found = fit_weight(weight, gram, layer, mask, iterations, _generator(3))
    blocks = to_blocks(weight, 4)
    if mask is None:
        expected = fit_em(blocks, gram, 32, iterations, generator=_generator(3))
    else:
        expected = fit_em_masked(blocks, gram, to_blocks(mask, 4), 32, iterations, generator=_generator(3))
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.codebook, storable(expected.codebook, storage))
    assert not torch.equal(found.codebook, expected.codebook)


def test_the_codebook_has_the_weights_type() -> None:
    weight, gram = _case()
    assert fit_weight(weight.bfloat16(), gram, _layer(), None, 5, _generator()).codebook.dtype == torch.bfloat16
    assert fit_weight(weight.double(), gram, _layer(), None, 5, _generator()).codebook.dtype == torch.float64


def test_codewords_that_stand_for_nothing_are_counted() -> None:
    weight = torch.randn(2, 4).repeat(32, 4)  # two blocks, again and again
    found = fit_weight(weight, torch.eye(4), _layer(), None, 5, _generator())
    assert found.warnings == ("14 of 16 codewords are not used",)
    weight, gram = _case()
    assert fit_weight(weight, gram, _layer(), None, 5, _generator()).warnings == ()


def test_the_number_of_iterations_is_the_settings() -> None:
    model = randomized(nn.Sequential(nn.Linear(12, 64)))
    first = bgd.LayerConfig(block_size=4, codebook_size=16)
    one, many = (
        bgd.quantize(model, vectors(), em(em_iterations=n, first_layer=first), progress=False).report.layers[0]
        for n in (1, 30)
    )
    assert many.relative_error < 0.99 * one.relative_error


@pytest.mark.parametrize("is_masked", [False, True])
def test_trellis_codes_are_fitted_to_the_weight_alone(is_masked: bool) -> None:
    """A convolution's kernels are rows; errors of weights that are zero are not carried over."""
    weight = torch.randn(24, 4, 2, 2)
    mask = torch.rand(24, 4, 2, 2) > 0.4 if is_masked else None
    found = fit_weight(weight, torch.eye(4), _layer(codes="trellis"), mask, 5, _generator())
    expected = fit_windows(weight.flatten(1), None, mask=None if mask is None else mask.flatten(1))
    assert found.form == "trellis"
    assert torch.equal(found.codes, expected.codes) and torch.equal(found.codebook, expected.codebook)
    decoded = found.decoded(weight.shape)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    assert float((decoded - weight)[kept].square().mean()) < 0.15


@pytest.mark.parametrize("is_masked", [False, True])
def test_codewords_that_are_not_used_are_said_of_either_fit(is_masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_em, "unused_codewords", lambda codes, size: (f"{size} of {codes.numel()}",))
    weight, gram = _case()
    mask = torch.rand(64, 16) > 0.4 if is_masked else None
    assert fit_weight(weight, gram, _layer(), mask, 5, _generator()).warnings == ("16 of 256",)
