"""Trellis codes through every framework: the core's codes, and the same network again from the framework's files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.nn import PQModule
from tests.adapters.entrances import ENTRANCES, same_state
from tests.adapters.test_same_as_core import _their_vit
from tests.networks import PlainNet, vectors

TRELLIS = LayerConfig(codes="trellis")
CONFIG = BGDConfig(linear=TRELLIS, conv=TRELLIS, pointwise_conv=TRELLIS, first_layer=TRELLIS, max_divergence=None)


def _from_neural_compressor(folder: Path, model: nn.Module) -> Any:
    return bgd.load_adapter("neural_compressor").load(str(folder), model)


def _from_modelopt(folder: Path, model: nn.Module) -> Any:
    import modelopt.torch.opt as mto

    return mto.restore(model, folder / "model.pt")


def _from_torchao(folder: Path, model: nn.Module) -> Any:
    state = torch.load(folder / "model.pt", weights_only=True)
    bgd.load_adapter("torchao").make_room_(model, state).load_state_dict(state, assign=True)
    return model


def _from_transformers(folder: Path, model: Any) -> Any:
    return type(model).from_pretrained(folder)


LOADS: dict[str, Callable[[Path, Any], Any]] = {
    "neural_compressor": _from_neural_compressor,
    "modelopt": _from_modelopt,
    "torchao": _from_torchao,
    "transformers": _from_transformers,
}


def _case(name: str) -> tuple[Callable[[], nn.Module], list[Any]]:
    if name != "transformers":
        return PlainNet, vectors()
    images = [torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return _their_vit, [{"pixel_values": batch} for batch in images]


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make().eval()


@pytest.mark.parametrize("name", ENTRANCES)
def test_the_codes_are_the_cores_and_come_back(name: str, tmp_path: Path) -> None:
    entrance, (make, batches) = ENTRANCES[name], _case(name)
    if entrance.missing:
        pytest.skip(entrance.missing)
    expected = bgd.quantize(_seeded(make), batches, CONFIG, progress=False).model
    result = entrance.quantize(_seeded(make), batches, CONFIG)
    forms = [module.form.name for module in result.modules() if isinstance(module, PQModule)]
    assert len(forms) > 1 and set(forms) == {"trellis"}
    assert same_state(result, expected)
    entrance.save(result, tmp_path)
    again = LOADS[name](tmp_path, make()).eval()
    assert same_state(again, result)
    assert [module.form.name for module in again.modules() if isinstance(module, PQModule)] == forms
    batch = batches[0]
    outputs = [model(**batch).logits if isinstance(batch, dict) else model(batch) for model in (result.eval(), again)]
    assert torch.equal(*outputs)
