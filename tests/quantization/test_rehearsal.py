"""Code that looks at its layers is noticed before the fit: these layers stay float, with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import front_end
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.quantization import rehearsal
from bgd_plugin.quantization.rehearsal import rehearsed
from tests.networks import em, vectors


class Looks(nn.Module):
    """Computes with `b` only if it is a linear layer of torch's own class."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        y = torch.tanh(self.b(y) if type(self.b) is nn.Linear else y)
        y = self.c(y)
        return -y if self.branches and y.sum() > 1e9 else y


@pytest.mark.parametrize("branches", [False, True])
def test_a_layer_at_which_code_looks_stays_float(branches: bool) -> None:
    model, data = Looks(branches).eval(), vectors()
    result = bgd.quantize(model, data, em(), progress=False)
    assert [layer.name for layer in result.report.layers] == ["c"]
    reasons = {skipped.name: skipped.reason for skipped in result.report.skipped}
    assert reasons["b"].startswith("the network's code looks at its class, attributes or parameters")
    assert type(result.model.b) is nn.Linear


def test_code_that_looks_at_all_parameters_is_refused_before_the_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sums(Looks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + sum(p.square().mean() for p in self.parameters())  # type: ignore[no-any-return]

    def never(*args: Any) -> Any:
        raise AssertionError("the fit has begun")

    monkeypatch.setattr("bgd_plugin.quantization.one_pass.quantize_layers", never)
    with pytest.raises(bgd.errors.ConfigError, match=r"no layer .* can be quantized: .*looks at its class"):
        bgd.quantize(Sums(branches=True), vectors(), em(), progress=False)


def test_a_budget_counts_with_what_is_left() -> None:
    model, data = Looks(branches=False).eval(), vectors(batch=16)
    result = bgd.quantize(model, data, bgd.BGDConfig(target_bytes=5200), progress=False)
    assert result.report.compressed_bytes <= 5200
    assert "b" in {skipped.name for skipped in result.report.skipped}


# --- the step by itself, on networks without a graph


class _Branching(nn.Module):
    """Two layers, a branch that no trace follows, and code of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a, self.b = nn.Embedding(20, 12), nn.Linear(12, 32), nn.Linear(32, 32)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x if x.is_floating_point() else self.table(x)))
        x = self.b(self.between(x))
        return -x if float(x.detach().sum()) > 1e9 else x


def _rehearsed(model: nn.Module, data: list[Tensor] | None = None, **fields: Any) -> tuple[Survey, Survey]:
    """The survey before and after; the network has to be as it came."""
    every = em(first_layer=LayerConfig(block_size=4), **fields)
    survey = surveyed(front_end(model), every, original=model)
    assert not isinstance(survey.network, torch.fx.GraphModule)
    before, modules = dict(survey.own.state_dict()), list(survey.own.modules())
    found = rehearsed(survey.own, survey, [Batch((x,)) for x in data or vectors()])
    assert list(survey.own.modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in survey.own.state_dict().items())
    return survey, found


def test_a_network_that_looks_at_nothing_keeps_its_survey() -> None:
    survey, found = _rehearsed(_Branching().eval())
    assert found is survey and [layer.name for layer in survey.found] == ["a", "b"]


def test_an_embedding_answers_with_its_exact_rows() -> None:
    words = [torch.randint(0, 20, (4, 6)) for _ in range(2)]
    survey, found = _rehearsed(_Branching().eval(), words, embedding=LayerConfig(block_size=4, codebook_size=4))
    assert found is survey and "table" in {layer.name for layer in survey.found}


def test_a_layer_that_differs_on_another_process_stays_float_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    own: list[bool] = []
    monkeypatch.setattr(rehearsal, "largest", lambda flag: own.append(flag) or True)
    with pytest.raises(ConfigError, match=r"it does so on another process|keeps its weight elsewhere"):
        _rehearsed(_Branching().eval())
    monkeypatch.setattr(rehearsal, "largest", lambda flag: False)
    survey, found = _rehearsed(_Branching().eval())
    assert found is survey and own[0] is False


def test_a_layer_whose_module_another_process_does_not_read_stays_float_here_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []

    def largest(flag: bool) -> bool:
        asked.append(flag)
        return flag or len(asked) == 2  # after the trial of all layers, the first of them

    monkeypatch.setattr(rehearsal, "largest", largest)
    survey, found = _rehearsed(_Branching().eval())
    assert [layer.name for layer in survey.found] == ["a", "b"] and [layer.name for layer in found.found] == ["b"]
    assert next(s.reason for s in found.skipped if s.name == "a").startswith("the network's code keeps its weight")


def test_a_network_that_fails_with_other_layers_says_how() -> None:
    class Strict(_Branching):
        def between(self, x: Tensor) -> Tensor:
            if type(self.b) is not nn.Linear:
                raise ValueError("b is no linear layer")
            return x

    _, found = _rehearsed(Strict().eval())
    assert [layer.name for layer in found.found] == ["a"]
    (reason,) = [skipped.reason for skipped in found.skipped if skipped.name == "b"]
    assert "the network's code looks at its class" in reason and "b is no linear layer" in reason


def test_what_only_all_layers_together_change_is_refused() -> None:
    class Counts(_Branching):
        def between(self, x: Tensor) -> Tensor:
            return x if any(type(layer) is nn.Linear for layer in (self.a, self.b)) else -x

    with pytest.raises(ConfigError, match=r"Counts does not compute the same with quantized modules .*: its answer"):
        _rehearsed(Counts().eval())


_ELSEWHERE: dict[str, nn.Module] = {}


def test_a_layer_that_code_reaches_another_way_stays_float() -> None:
    class Elsewhere(_Branching):
        def between(self, x: Tensor) -> Tensor:
            return x + _ELSEWHERE["c"](x)  # type: ignore[no-any-return]

    model = Elsewhere().eval()
    model.c = nn.Linear(32, 32)
    survey = surveyed(front_end(model, share_tensors=True), em(), original=model)
    _ELSEWHERE["c"] = survey.own.get_submodule("c")
    found = rehearsed(survey.own, survey, [Batch((x,)) for x in vectors()])
    assert {layer.name for layer in survey.found} >= {"b", "c"}
    assert "c" not in {layer.name for layer in found.found} and "b" in {layer.name for layer in found.found}
    (reason,) = [skipped.reason for skipped in found.skipped if skipped.name == "c"]
    assert reason.startswith("the network's code keeps its weight elsewhere")


def test_a_layer_that_the_first_batch_does_not_reach_stays_in_the_survey() -> None:
    class Rarely(_Branching):
        def between(self, x: Tensor) -> Tensor:
            return self.c(x) if float(x.abs().max()) > 1e9 else x  # type: ignore[no-any-return]

    model = Rarely().eval()
    model.c = nn.Linear(32, 32)
    survey, found = _rehearsed(model)
    assert found is survey and "c" in {layer.name for layer in survey.found}


class _Remembers(_Branching):
    """Writes a tensor at each run, on which the next answer may depend."""

    def __init__(self, *, depends: bool) -> None:
        super().__init__()
        self.depends = depends
        self.memory = {"last": torch.zeros(1)}

    def between(self, x: Tensor) -> Tensor:
        y = x + self.memory["last"] if self.depends else x
        self.memory["last"] = x.mean().reshape(1)
        return y


@pytest.mark.parametrize("depends", [False, True])
def test_tensors_that_runs_write_are_scratch_if_no_answer_depends_on_them(
    depends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[Any] = []
    monkeypatch.setattr(rehearsal, "note_scratch_", lambda own, names: noted.append((type(own), list(names))))
    _rehearsed(_Remembers(depends=depends).eval())
    assert noted == ([] if depends else [(_Remembers, ["memory[last]"])])


class _Caches(_Branching):
    """Computes something of a weight once."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}

    def between(self, x: Tensor) -> Tensor:
        if "scale" not in self.cache:
            self.cache["scale"] = self.b.weight.detach().abs().mean()
        return x * self.cache["scale"]


@pytest.mark.parametrize("is_made", [True, False])
def test_what_was_computed_of_float_weights_is_forgotten(is_made: bool) -> None:
    """The compressed network computes it anew; what no run makes again stays."""
    model = _Caches().eval()
    if is_made:
        model(vectors()[0])
    else:
        model.cache["scale"] = torch.tensor(3.0)
    survey = surveyed(front_end(model), em(), original=model)
    rehearsed(survey.own, survey, [Batch((x,)) for x in vectors()])
    assert list(survey.own.cache) == ([] if is_made else ["scale"])  # type: ignore[arg-type, call-overload]
    assert is_made or float(survey.own.cache["scale"]) == 3.0  # type: ignore[index, operator, arg-type]
    assert "scale" in model.cache


def test_what_a_run_writes_in_place_or_makes_anew_counts_as_written() -> None:
    tensor = torch.zeros(3)
    before = tensor, tensor._version
    assert rehearsal._is_written(tensor, None) and not rehearsal._is_written(tensor, before)
    assert not rehearsal._is_written(tensor[:], (tensor, tensor._version))
    assert rehearsal._is_written(torch.zeros(3), before)
    tensor += 1
    assert rehearsal._is_written(tensor, before)


def test_a_graph_is_not_tried() -> None:
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 32)).eval())
    survey = surveyed(front_end(model), em(), original=model)
    assert rehearsed(survey.own, survey, []) is survey


def test_answers_are_equal_if_all_their_tensors_are() -> None:
    one, other = torch.ones(2), torch.zeros(2)
    assert rehearsal._are_equal([one, {"x": (other, 1)}], [one.clone(), {"x": (other.clone(), 2)}])
    assert not rehearsal._are_equal([one, other], [one, one])
