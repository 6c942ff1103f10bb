"""Modes and gradient flags are the user's again at the end."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.files.rounding import eight_bit_rows
from bgd_plugin.graph import front_end
from bgd_plugin.nn import FrozenNorm, PQModule, quantized
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.quantization.finish import restore_, round_to_storage_
from tests.networks import SmallResNet, em, images, randomized


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


def test_a_parameter_with_two_names_keeps_its_flag_under_both() -> None:
    """Also where the compressed network has two parameters of it."""
    model, student = _pair()
    model[2].bias = model[0].bias  # type: ignore[index,union-attr]
    model[0].bias.requires_grad_(False)  # type: ignore[index,operator,union-attr]
    restore_(student, model, {})
    assert not student[0].bias.requires_grad and not student[2].bias.requires_grad  # type: ignore[index,union-attr]


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


def _survey(model: nn.Module, **fields: Any) -> Any:
    return surveyed(front_end(model), em(**fields), original=model)


def test_each_kind_of_value_is_rounded_as_its_setting_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)).eval()
    model.table = nn.Parameter(torch.randn(7), requires_grad=False)
    survey = _survey(model, weight_storage="int8", float_storage="float16", codebook_storage="int8")
    assert survey.leftovers == ("0.weight",) and survey.tables == {"table"}
    student = copy.deepcopy(model)
    student[1] = quantized(copy.deepcopy(model[1]), torch.randn(16, 4), torch.randint(0, 16, (32, 8)))
    before = copy.deepcopy(student)
    round_to_storage_(student, survey)
    codebook: Any = student[1].codebook.detach()
    assert torch.equal(codebook, before[1].codebook) is False and eight_bit_rows(codebook, is_codebook=True) is not None
    assert eight_bit_rows(student[0].weight.detach(), is_codebook=False) is not None
    assert torch.equal(student[2].weight, before[2].weight.half().float())
    assert torch.equal(student[0].bias, before[0].bias.half().float())
    assert torch.equal(student.table, before.table)


def test_single_precision_stays_and_norms_freeze_if_that_is_asked_for() -> None:
    model = randomized(nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Linear(32, 32)))
    student = copy.deepcopy(model)
    round_to_storage_(student, _survey(model))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in student.state_dict().items())
    round_to_storage_(student, _survey(model, freeze_norms=True))
    assert isinstance(student[1], FrozenNorm)


def test_weights_that_a_norm_scales_stay_the_small_integers_that_they_are() -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 32, 1),
        nn.Conv2d(32, 32, 3, groups=32, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 1),
    )
    model = randomized(nn.Sequential(*layers))
    integers = torch.randint(-15, 16, (32, 1, 3, 3)).float() / 64
    model[1].weight.data.copy_(integers)
    survey = _survey(model, weight_storage="int5")
    assert set(survey.leftovers) == {"0.weight", "1.weight"}
    student = copy.deepcopy(model)
    round_to_storage_(student, survey)
    assert torch.equal(student[1].weight, integers) and not torch.equal(student[0].weight, model[0].weight)
