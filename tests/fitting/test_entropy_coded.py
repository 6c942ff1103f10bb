"""A layer fitted to the bytes that its plan has for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.eight_bit import to_eight_bits
from bgd_plugin.encoding.stream import encoded
from bgd_plugin.fitting import entropy_coded, fit_weight
from bgd_plugin.fitting.entropy_coded import fit_stream
from tests.planning.test_coded import PLANNED


def _weight() -> Tensor:
    return torch.randn(60, 20, 2, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_the_levels_are_as_the_file_stores_them(storage: str) -> None:
    layer = dataclasses.replace(PLANNED, size_bytes=1600, codebook_storage=storage)
    fit = fit_stream(_weight(), None, layer)
    stored = fit.codebook if storage == "float16" else to_eight_bits(fit.codebook.reshape(1, -1))
    assert stored is not None
    assert storage == "int8" or torch.equal(fit.codebook.half().float(), fit.codebook)
    level_bytes = len(fit.codebook) * (1 if storage == "int8" else 2)
    assert encoded([(fit.codes, len(fit.codebook))])[0].numel() + level_bytes <= 1600
    assert fit.codes.shape == (60, 80)


def test_the_inputs_decide_which_errors_count() -> None:
    """Half of the columns are never seen: their weights cost nothing to get wrong."""
    gram = torch.diag((torch.arange(80) < 40).double())[None] + 1e-6 * torch.eye(80)
    layer = dataclasses.replace(PLANNED, size_bytes=1600)
    fit = fit_stream(_weight(), gram, layer)
    error = (_weight().flatten(1) - fit.codebook[fit.codes].squeeze(2)).square().mean(0)
    blind = fit_stream(_weight(), None, layer)
    other = (_weight().flatten(1) - blind.codebook[blind.codes].squeeze(2)).square().mean(0)
    assert float(error[:40].mean()) < 0.5 * float(other[:40].mean())


def test_a_weight_alone_is_fitted_to_its_bytes_too() -> None:
    layer = dataclasses.replace(PLANNED, size_bytes=1600)
    generator = torch.Generator().manual_seed(0)
    fit = fit_weight(_weight(), torch.eye(1), layer, None, 10, generator)
    assert torch.equal(fit.codes, fit_stream(_weight(), None, layer).codes)


@pytest.mark.parametrize(("storage", "level_bytes"), [("int8", 1), ("float16", 2)])
def test_everything_that_the_plan_says_reaches_the_fit(
    storage: str, level_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = entropy_coded.fit_entropy, list[Any]()

    def watched(*arguments: Any, **settings: Any) -> Any:
        seen.append((arguments, settings))
        return real(*arguments, **settings)

    monkeypatch.setattr(entropy_coded, "fit_entropy", watched)
    weight, gram = _weight().bfloat16(), torch.eye(80, dtype=torch.float64)[None]
    fit = fit_stream(weight, gram, dataclasses.replace(PLANNED, size_bytes=1600, codebook_storage=storage), damping=0.3)
    (((rows, given, size), settings),) = seen
    assert torch.equal(rows, weight.float().flatten(1)) and given is gram and size == 1600
    assert settings == {"level_bytes": level_bytes, "damping": 0.3}
    assert fit.codebook.dtype == torch.bfloat16
