"""What a run leaves in a network, and no answer depends on, is neither stored nor compared."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError
from tests.networks import em, same_outputs, vectors


class _Net(nn.Module):
    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 16)
        self.scale = nn.Parameter(torch.randn(16))
        self.kept: Any = self.empty()

    def empty(self) -> Any:
        return None

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        if self.branches and x.sum() > 1e9:
            x = -x
        return self.b(x + self.table(x))

    def table(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class _Dict(_Net):
    def empty(self) -> Any:
        return {}

    def table(self, x: Tensor) -> Tensor:
        if "cpu" not in self.kept:
            self.kept["cpu"] = self.scale.detach().repeat(500, 1)
        return self.kept["cpu"][0]  # type: ignore[no-any-return]


class _Attribute(_Net):
    def table(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = self.scale.detach().repeat(500, 1)
        return self.kept[0]  # type: ignore[no-any-return]


class _Pyramid(_Net):
    def empty(self) -> Any:
        return [torch.zeros(1)]

    def table(self, x: Tensor) -> Tensor:
        self.kept = [x * self.scale, x[:1]]
        return self.kept[0].mean(0)  # type: ignore[no-any-return]


class _Property(_Net):
    @functools.cached_property
    def big(self) -> Tensor:
        return self.scale.detach().repeat(500, 1)

    def table(self, x: Tensor) -> Tensor:
        return self.big[0]


CACHES = (_Dict, _Attribute, _Pyramid, _Property)


def _built(kind: type[_Net], branches: bool, seed: int) -> _Net:
    torch.manual_seed(seed)
    return kind(branches).eval()


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("kind", CACHES)
def test_a_network_that_has_run_since_is_saved_and_loaded(kind: type[_Net], branches: bool, tmp_path: Path) -> None:
    model, data = _built(kind, branches, 0), vectors()
    result = bgd.quantize(model, data, em(), progress=False)
    for x in data:
        result.model(x)
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes
    loaded = bgd.load(tmp_path / "net", like=_built(kind, branches, 1))
    assert same_outputs(result.model, loaded, data)


class _Constants(_Net):
    """Reads tensors out of a dict; one of them may be missing."""

    def empty(self) -> Any:
        return {"shift": torch.ones(16), "more": torch.full((16,), 0.5)}

    def table(self, x: Tensor) -> Tensor:
        return self.kept.get("shift", torch.zeros(16)) + self.kept["more"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
@pytest.mark.parametrize("kind", [_Dict, _Property, _Pyramid])
def test_a_network_that_has_run_before_is_saved_and_loaded(kind: type[_Net], branches: bool, tmp_path: Path) -> None:
    model, data = _built(kind, branches, 0), vectors()
    model(data[0])
    before = dict(model.kept) if isinstance(model.kept, dict) else model.kept
    found = bgd.quantize(model, data, em(), progress=False).model
    assert (dict(model.kept) if isinstance(model.kept, dict) else model.kept) == before
    found(data[0])
    bgd.save(found, tmp_path / "net")
    assert same_outputs(found, bgd.load(tmp_path / "net", like=_built(kind, branches, 1)), data)


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
def test_constants_in_a_dict_stay(branches: bool, tmp_path: Path) -> None:
    model, data = _built(_Constants, branches, 0), vectors()
    found = bgd.quantize(model, data, em(), progress=False).model
    assert torch.equal(found.kept["shift"], torch.ones(16))
    bgd.save(found, tmp_path / "net")
    like = _built(_Constants, branches, 1)
    assert same_outputs(found, bgd.load(tmp_path / "net", like=like), data)
    like.kept["shift"] = torch.zeros(16)
    with pytest.raises(CheckpointError, match=r"kept\[shift\].*fingerprint"):
        bgd.load(tmp_path / "net", like=like)


@pytest.mark.parametrize("kind", [_Dict, _Property])
def test_what_a_run_has_left_in_like_is_not_kept(kind: type[_Net], tmp_path: Path) -> None:
    data, like = vectors(), _built(kind, branches=False, seed=1)
    found = bgd.quantize(_built(kind, branches=False, seed=0), data, em(), progress=False).model
    bgd.save(found, tmp_path / "net")
    like(data[0])
    before = dict(vars(like))
    assert same_outputs(found, bgd.load(tmp_path / "net", like=like), data)
    assert dict(vars(like)) == before


class _Stream(_Net):
    """Its answers depend on what it has seen before."""

    def empty(self) -> Any:
        return [torch.zeros(8, 16)]

    def table(self, x: Tensor) -> Tensor:
        past = self.kept[0]
        self.kept = [x.detach()]
        return past  # type: ignore[no-any-return]


@pytest.mark.parametrize("branches", [False, True], ids=["graph", "runs"])
def test_state_that_answers_depend_on_is_refused_where_it_differs(branches: bool, tmp_path: Path) -> None:
    data = vectors()
    found = bgd.quantize(_built(_Stream, branches, 0), data, em(), progress=False).model
    found(data[0])
    bgd.save(found, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"kept\[0\].*fingerprint"):
        bgd.load(tmp_path / "net", like=_built(_Stream, branches, 1))


class _Passed(_Dict):
    """Two modules hold one dict; another program has put it there."""

    def empty(self) -> Any:
        held: dict[str, Any] = {}
        self.b.shared = held
        return held


@pytest.mark.parametrize("branches", [False, True])
def test_a_dict_that_two_modules_hold_is_one(branches: bool, tmp_path: Path) -> None:
    model = _Passed(branches).eval()
    with torch.no_grad():
        model(vectors()[0])
    result = bgd.quantize(model, vectors(), em(), progress=False).model
    assert "cpu" in model.kept and model.b.shared is model.kept
    bgd.save(result, tmp_path / "net")
    assert same_outputs(result, bgd.load(tmp_path / "net", like=_Passed(branches).eval()), vectors())
