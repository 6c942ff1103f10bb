"""Mixed samples: made of two of the batch each, the same for the same number, and refused where that has no sense."""

from __future__ import annotations

import pytest
import torch

import bgd_plugin as bgd
from bgd_plugin import FinetuningConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import CalibrationError
from bgd_plugin.training.mixing import mixed
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors


def test_a_blended_sample_lies_between_two_of_the_batch() -> None:
    samples = torch.randn(6, 5, generator=torch.Generator().manual_seed(1))
    (found,) = mixed(Batch((samples,)), 0).args
    for index, row in enumerate(found):
        fits = []
        for other in samples:
            way = samples[index] - other
            share = float((row - other) @ way / (way @ way).clamp(min=1e-12))
            fits.append(0 <= share <= 1 and torch.allclose(other + share * way, row, atol=1e-5))
        assert any(fits)


def test_a_pasted_square_comes_from_another_picture_and_the_rest_stays() -> None:
    pictures = torch.arange(4.0)[:, None, None, None].expand(4, 3, 8, 8).clone()
    (found,) = mixed(Batch((pictures,)), 7).args
    changed = (found != pictures).any(1)
    assert changed.any()
    for picture, where in zip(found, changed, strict=True):
        rows, columns = where.any(1).nonzero(), where.any(0).nonzero()
        if len(rows):
            square = picture[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert len(square.unique()) == 1  # all of it from one picture
            assert len(rows) == len(columns)


def test_the_number_alone_decides() -> None:
    batch = Batch((torch.randn(4, 3, 8, 8),))
    assert torch.equal(mixed(batch, 3).args[0], mixed(batch, 3).args[0])
    assert not torch.equal(mixed(batch, 3).args[0], mixed(batch, 5).args[0])


def test_all_tensors_of_a_batch_are_mixed_alike_and_the_batch_itself_stays() -> None:
    samples = torch.randn(4, 5)
    batch = Batch((samples.clone(),), {"other": 2 * samples})
    found = mixed(batch, 0)
    torch.testing.assert_close(found.kwargs["other"], 2 * found.args[0])
    assert torch.equal(batch.args[0], samples)


def test_a_single_sample_stays() -> None:
    batch = Batch((torch.randn(1, 5),))
    assert mixed(batch, 0) is batch


def test_tokens_are_refused() -> None:
    with pytest.raises(CalibrationError, match=r"mixing=True cannot blend a tensor of int64 \[4, 7\]"):
        mixed(Batch((torch.ones(4, 7, dtype=torch.long),)), 0)


@pytest.mark.parametrize("model", [PlainNet(), randomized(SmallResNet())], ids=["vectors", "pictures"])
def test_finetuning_mixes(model: torch.nn.Module) -> None:
    data = vectors() if isinstance(model, PlainNet) else images()
    plain, mixing = (
        bgd.quantize(model, data, em(finetuning=FinetuningConfig(steps=4, mixing=mixing)), progress=False)
        for mixing in (False, True)
    )
    states = [result.model.state_dict() for result in (plain, mixing)]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in states[0])
