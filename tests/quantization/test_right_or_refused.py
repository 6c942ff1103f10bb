"""A network that is out of the ordinary in one way comes back as it was, or the call refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.networks import randomized
from tests.quantization.unusual import LAYER_KINDS, LAYERS, Net, first_tensor
from tests.quantization.unusual_networks import NETWORK_KINDS

FINE = LayerConfig(block_size=1, codebook_size=4096)
CONFIG = BGDConfig(
    conv=FINE,
    pointwise_conv=FINE,
    linear=FINE,
    first_layer=FINE,
    codebook_storage="float16",
    float_storage="float32",
    weight_storage="float32",
)
BOUND = 0.01
REFUSED = {"SumsItsParameters"}


def _build(kind: str, changes: dict[str, str], branches: bool) -> Any:
    torch.manual_seed(0)
    model = randomized(NETWORK_KINDS[kind](branches))
    for layer, change in changes.items():
        setattr(model, layer, LAYER_KINDS[change](getattr(model, layer)))
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    return model.eval()


def _data(kind: str) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(2)]
    return [{"x": x, "shift": 0.5} for x in batches] if kind == "KeywordOnly" else batches


def _answer(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model(**batch) if isinstance(batch, dict) else model(batch)


def _check(kind: str, changes: dict[str, str], branches: bool, folder: Path | None, method: Any) -> None:
    model, data = _build(kind, changes, branches), _data(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = _answer(_build(kind, changes, branches), data[0])
    try:
        found = bgd.quantize(model, data, BGDConfig.from_dict(CONFIG.to_dict() | {"method": method}), progress=False)
    except bgd.BGDError as error:
        assert kind in REFUSED, error
        assert "conv2d" not in str(error)
        return
    assert kind not in REFUSED
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(found.model) is type(model)
    assert {"conv", "gate", "out"} <= {layer.name for layer in found.report.layers}
    if folder is not None:
        bgd.save(found.model, folder / "net")
        loaded = bgd.load(folder / "net", like=_build(kind, changes, branches))
        assert type(loaded) is type(model)
    answer = _answer(found.model, data[0])
    assert type(answer) is type(wanted)
    exact, mine = first_tensor(wanted), first_tensor(answer)
    assert float((mine - exact).norm() / exact.norm()) < (2 * BOUND if kind == "Autocast" else BOUND)
    if folder is not None:
        assert torch.equal(first_tensor(_answer(loaded, data[0])), mine)


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("kind", NETWORK_KINDS)
def test_a_network_with_code_of_its_own(kind: str, branches: bool, tmp_path: Path) -> None:
    _check(kind, {}, branches, tmp_path, "full")


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("layer", ["conv", "body"])
@pytest.mark.parametrize("change", LAYER_KINDS)
def test_a_layer_that_was_changed(change: str, layer: str, branches: bool, tmp_path: Path) -> None:
    _check("Net", {layer: change}, branches, tmp_path, "em")


@settings(max_examples=12)
@given(
    kind=st.sampled_from([kind for kind in NETWORK_KINDS if kind not in REFUSED]),
    changes=st.dictionaries(st.sampled_from(LAYERS), st.sampled_from(list(LAYER_KINDS)), max_size=2),
    branches=st.booleans(),
    method=st.sampled_from(["em", "full"]),
)
def test_several_things_at_once(kind: str, changes: dict[str, str], branches: bool, method: str) -> None:
    _check(kind, changes, branches, None, method)


def test_kinds_are_networks_of_one_family() -> None:
    assert all(issubclass(kind, Net) for kind in NETWORK_KINDS.values())
