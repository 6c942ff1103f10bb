"""The bytes that a plan foresees are those that a run ends in, whatever is stored how; and the paper's own count."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.sizes import Sketch
from bgd_plugin.planning.survey import surveyed
from tests.networks import SmallResNet, images, randomized


class _Kinds(nn.Module):
    """A first layer, a depthwise one, norms, a tied weight, a layer with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 1)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.one, self.two = nn.Linear(32, 32), nn.Linear(32, 32)
        self.two.weight = self.one.weight
        self.head = nn.Linear(32, 40)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        return self.head(torch.tanh(self.two(torch.tanh(self.one(x)))))


def _network(zeros: bool = False) -> Any:
    model = randomized(_Kinds())
    if zeros:
        model.head.weight.data *= torch.rand(40, 32) > 0.6
    return model


_FIELDS: list[dict[str, Any]] = [
    {},
    {"codebook_storage": "float16"},
    {"weight_storage": "float32"},
    {"weight_storage": "float16"},
    {"float_storage": "float32"},
    {"freeze_norms": True},
    {"preserve_zeros": True},
    {"overrides": (("stem", LayerConfig(block_size=3, codebook_size=4)), ("head", None))},
    {"depthwise_conv": LayerConfig(block_size=9, codebook_size=4)},
    {"method": "em"},
]


@pytest.mark.parametrize("fields", _FIELDS, ids=str)
def test_the_plan_has_the_bytes_of_the_file(fields: dict[str, Any]) -> None:
    model, config = (
        _network("preserve_zeros" in fields),
        BGDConfig(**({"batchnorm": "keep"} | fields), max_divergence=None),
    )
    plan, result = bgd.plan(model, config), bgd.quantize(model, images(2), config, progress=False)
    written = len(file_bytes(stored(result.model)))
    assert plan.compressed_bytes == written
    assert result.report.compressed_bytes == written
    assert result.report.paper_bytes == plan.paper_bytes == _paper(result.model)


def _paper(model: nn.Module) -> int:
    """log₂ k bits for each code, 16 for each number of a codebook, 32 for every other parameter, each once."""
    bits, codebooks = 0, set[int]()
    for module in model.modules():
        if isinstance(module, PQModule) and id(module.codebook) not in codebooks:
            codebooks.add(id(module.codebook))
            bits += module.codes.numel() * int(math.log2(len(module.codebook))) + 16 * module.codebook.numel()
            if module.mask is not None:
                bits += 8 * _mask_bytes(module.mask)
    bits += 32 * sum(p.numel() for p in model.parameters() if id(p) not in codebooks)
    return -(-bits // 8)


def _mask_bytes(mask: Tensor) -> int:
    from bgd_plugin.encoding.masks import mask_form, pack_mask

    return pack_mask(mask, mask_form(mask)).numel()


def test_a_budget_reserves_single_precision_for_what_a_run_will_change() -> None:
    """Statistics and biases that half precision holds before a run are no longer so after it."""
    model = randomized(SmallResNet())
    changing = [v for v in model.state_dict().values() if v.ndim == 1 and v.is_floating_point()]
    for value in changing:
        value.copy_(value.half())
    with pytest.raises(bgd.BGDError, match="least possible size is") as error:
        bgd.plan(model, BGDConfig(target_bytes=1, float_storage="float32"))
    least = int(str(error.value).split("least possible size is ")[1].split(" ")[0].replace(",", ""))
    smallest = BGDConfig(target_bytes=least, float_storage="float32")
    sizes = {layer.name: (layer.block_size, layer.codebook_size) for layer in bgd.plan(model, smallest).layers}
    overrides = tuple((name, LayerConfig(block_size=d, codebook_size=k)) for name, (d, k) in sizes.items())
    as_it_is = bgd.plan(
        model, BGDConfig(overrides=overrides, float_storage="float32", max_divergence=None)
    ).compressed_bytes
    assert least - as_it_is == pytest.approx(2 * sum(v.numel() for v in changing), abs=64)


def test_a_free_layer_that_stays_float_counts_with_its_values() -> None:
    """Half precision holds them, so the file does, although single precision was asked for."""
    model = nn.Sequential(nn.Linear(12, 32, bias=False), nn.ReLU(), nn.Linear(32, 48, bias=False)).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    config = BGDConfig(target_bytes=2_000, float_storage="float32", weight_storage="float32")
    survey = surveyed(model, config, original=model)
    assert set(survey.free) == {"2"}
    assert Sketch(survey).file_size(()) == len(file_bytes(stored(model))) < 3 * (12 * 32 + 32 * 48)
