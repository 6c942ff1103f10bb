"""Modes and gradient flags are the user's again at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.quantization.finish import restore_
from tests.networks import SmallResNet, images, randomized


def _pair() -> tuple[nn.Module, nn.Module]:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    student = copy.deepcopy(model)
    student[2] = quantized(copy.deepcopy(model[2]), torch.randn(4, 4), torch.randint(0, 4, (8, 2)))
    return model, student


def test_flags_and_modes_are_those_of_the_users_network() -> None:
    model, student = _pair()
    model.train()
    model[1].eval()  # type: ignore[index,operator]
    model[0].weight.requires_grad_(False)  # type: ignore[index,operator]
    student.eval().requires_grad_(False)
    restore_(student, model, {"2": True})
    assert [module.training for module in student] == [True, False, True]  # type: ignore[operator,union-attr]
    flags = {name: p.requires_grad for name, p in student.named_parameters()}
    assert not flags.pop("0.weight") and all(flags.values())


@pytest.mark.parametrize("is_learnt", [True, False])
def test_codebooks_learn_if_their_weights_did(is_learnt: bool) -> None:
    model, student = _pair()
    restore_(student, model, {"2": is_learnt, "0": True, "not there": False})
    assert student[2].codebook.requires_grad == is_learnt  # type: ignore[index,union-attr]
    assert student[2].bias.requires_grad and student[0].weight.requires_grad  # type: ignore[index,union-attr]


def test_a_parameter_that_is_new_learns() -> None:
    model, student = _pair()
    student[1].extra = nn.Parameter(torch.ones(1), requires_grad=False)  # type: ignore[index]
    restore_(student, model, {})
    assert student[1].extra.requires_grad  # type: ignore[index,union-attr]


@pytest.mark.parametrize("storage", ["int8", "float16"])
def test_what_is_saved_is_what_comes_back(storage: Any, tmp_path: Any) -> None:
    """Codewords, weights that stay float, and all other values are rounded to their storage types before."""
    config = bgd.BGDConfig(
        codebook_storage=storage, weight_storage="int8", float_storage="float16", max_divergence=None
    )
    model = randomized(SmallResNet())
    result = bgd.quantize(model, images(), config, progress=False).model
    bgd.save(result, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=model)
    assert any(isinstance(module, PQModule) for module in result.modules())
    state = loaded.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.state_dict().items())
