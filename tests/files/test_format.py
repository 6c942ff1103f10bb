"""How many bytes a network takes: planned, reported and on disk are one number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.files.format import file_bytes, file_size, stored
from bgd_plugin.files.same_tensor import state_bytes
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, em, images, randomized, vectors

NETWORKS = {
    "resnet": (SmallResNet, images(1)),
    "plain": (PlainNet, vectors(1)),
    "functional": (FunctionalNet, images(1, size=12)),
    "shared": (TwiceNet, vectors(1)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_planned_reported_and_written_bytes_are_one_number(network: str, tmp_path: Path) -> None:
    kind, data = NETWORKS[network]
    model = randomized(kind())
    config = em(linear=LayerConfig(block_size=4, codebook_size=8))
    result = bgd.quantize(model, data, config, progress=False)
    written = bgd.save(result.model, tmp_path / "net.safetensors")
    assert (tmp_path / "net.safetensors").stat().st_size == written
    assert result.report.compressed_bytes == written
    plan = bgd.plan(model, config)
    assert (plan.compressed_bytes, plan.paper_bytes) == (written, result.report.paper_bytes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_planned_bytes_are_right_in_other_types(dtype: torch.dtype) -> None:
    model = randomized(PlainNet()).to(dtype)
    result = bgd.quantize(model, [b.to(dtype) for b in vectors(1)], em(), progress=False)
    assert bgd.plan(model, em()).compressed_bytes == result.report.compressed_bytes


def test_a_whole_resnet18_keeps_close_to_the_papers_size() -> None:
    torchvision = pytest.importorskip("torchvision")
    model = randomized(torchvision.models.resnet18())
    plan = bgd.plan(model, BGDConfig.paper("small"))
    assert plan.compressed_bytes <= 1.05 * plan.paper_bytes


def test_the_papers_accounting_counts_what_the_paper_counts() -> None:
    model = SmallResNet()
    result = bgd.quantize(model, images(1), em(), progress=False)
    layers = sum(layer.compressed_bytes for layer in result.report.layers)  # codes and half precision codebooks
    left = [model.stem.weight, model.fc.bias, *(p for m in (model.bn1, model.bn2, model.bn3) for p in m.parameters())]
    assert result.report.paper_bytes == layers + 4 * sum(p.numel() for p in left)


def test_codes_are_packed_to_the_bit(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 40))
    config = em(linear=LayerConfig(block_size=4, codebook_size=32))
    result = bgd.quantize(model, vectors(features=8), config, progress=False)
    bgd.save(result.model, tmp_path / "net")
    with safetensors.safe_open(str(tmp_path / "net"), framework="pt") as file:
        assert file.get_tensor("1.codes").numel() == 40 * 8 * 5 // 8
        assert file.get_tensor("1.codebook").dtype == torch.float16


def test_a_codebook_too_large_for_half_precision_keeps_its_values(tmp_path: Path) -> None:
    model = PlainNet()
    model[2].weight.data *= 1e7
    result = bgd.quantize(model, vectors(), em(), progress=False)
    bgd.save(result.model, tmp_path / "net")
    assert bool(torch.isfinite(result.model.get_submodule("2").codebook).all())
    loaded = bgd.load(tmp_path / "net", like=PlainNet())
    assert torch.equal(loaded.get_submodule("2").codebook, result.model.get_submodule("2").codebook)
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes


def test_a_codebook_too_small_for_half_precision_keeps_its_values() -> None:
    model = nn.Sequential(PlainNet()[0], PlainNet()[2])
    model[1].weight.data *= 1e-9
    result = bgd.quantize(model, vectors(), em(), progress=False)
    assert result.report.layers[0].relative_error < 0.9  # codewords of zero would lose everything: 1.0


def test_a_shared_tensor_is_stored_once() -> None:
    model = TwiceNet()
    content = stored(model)
    assert sorted(content.tensors) == ["first.bias", "first.weight", "last.bias", "last.weight"] + [
        "shared.bias",
        "shared.weight",
    ]
    assert content.header["aliases"] == {"alias.weight": "shared.weight", "alias.bias": "shared.bias"}


@settings(max_examples=30)
@given(
    value=st.sampled_from([0.0, 1.0, 0.1, 65504.0, 1e-7, 1e30, float("inf")]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
)
def test_floats_are_stored_in_half_precision_only_if_nothing_is_lost(value: float, dtype: torch.dtype) -> None:
    module = nn.Module()
    module.register_buffer("x", torch.full((3,), value).to(dtype))
    kept = stored(module).tensors["x"]
    assert torch.equal(kept.to(dtype), module.x)
    assert kept.element_size() == (2 if torch.equal(module.x.half().to(dtype), module.x) else module.x.element_size())


@settings(max_examples=30)
@given(values=st.lists(st.integers(-(2**40), 2**40) | st.integers(-300, 300), min_size=1, max_size=4))
def test_integers_are_stored_in_the_narrowest_type(values: list[int]) -> None:
    module = nn.Module()
    module.register_buffer("x", torch.tensor(values))
    kept = stored(module).tensors["x"]
    assert kept.tolist() == values
    low, high = min(values), max(values)
    one, two, four = low >= 0 and high < 256, low >= -(2**15) and high < 2**15, low >= -(2**31) and high < 2**31
    assert kept.element_size() == (1 if one else 2 if two else 4 if four else 8)


@pytest.mark.parametrize("kind", [SmallResNet, TwiceNet])
def test_the_size_is_the_length_of_the_bytes(kind: Any) -> None:
    content = stored(kind())
    assert file_size(content) == len(file_bytes(content))


def test_state_bytes_count_shared_tensors_once() -> None:
    x = torch.zeros(10)
    assert state_bytes({"a": x, "b": x, "c": torch.zeros(3, dtype=torch.int64), "d": "text"}) == 64


@pytest.mark.parametrize(
    ("network", "regime", "most_mib"),
    [
        ("resnet18", "small", 1.48),
        ("resnet18", "large", 0.93),
        ("resnet50", "small", 4.93),
        ("resnet50", "large", 2.95),
    ],
)
def test_lean_files_of_the_papers_networks(network: str, regime: Any, most_mib: float) -> None:
    """The paper's codes and codebook sizes, everything counted."""
    torchvision = pytest.importorskip("torchvision")
    model = randomized(getattr(torchvision.models, network)())
    sizes: dict[str, Any] = {"fc_codebook_size": 2048 if network == "resnet18" else 1024}
    if network == "resnet18":
        sizes["pointwise_block_size"] = 4
    lean: dict[str, Any] = {"codebook_storage": "int8", "weight_storage": "int8", "float_storage": "float16"}
    config = BGDConfig.paper(regime, **sizes, **lean, freeze_norms=True)
    assert bgd.plan(model, config).compressed_bytes <= most_mib * 2**20
