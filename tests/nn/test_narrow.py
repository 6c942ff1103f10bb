"""A layer with a narrow weight is the float layer with the same weight, in a fraction of its memory."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import kernels
from bgd_plugin.encoding.eight_bit import round_to_eight_bits
from bgd_plugin.encoding.narrow import from_narrow, to_narrow
from bgd_plugin.errors import ConfigError
from bgd_plugin.nn import NarrowEmbedding, NarrowLinear, narrowed, widened

FORMS = {"half": torch.int16, "eight bits": torch.int8}


def _weight(form: str, rows: int = 70, columns: int = 45) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return values.half().float() if form == "half" else round_to_eight_bits(values)


def _linear(form: str, bias: bool = True, **sizes: int) -> tuple[nn.Linear, NarrowLinear]:
    weight = _weight(form, **sizes)
    dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).eval()
    dense.weight = nn.Parameter(weight)
    found = to_narrow(weight)
    assert found is not None and found[0].dtype == FORMS[form]
    narrow: Any = narrowed(dense, *found)
    return dense, narrow


@pytest.mark.parametrize("form", FORMS)
def test_a_narrow_weight_is_exact(form: str) -> None:
    weight = _weight(form)
    found = to_narrow(weight)
    assert found is not None and torch.equal(from_narrow(*found), weight)


def test_a_weight_in_no_form_has_none() -> None:
    assert to_narrow(torch.randn(30, 20)) is None
    assert to_narrow(_weight("half").double()) is None
    weight = torch.cat([_weight("half", rows=3), torch.randn(1, 45)])
    assert to_narrow(weight) is None


def test_rows_far_apart_are_looked_at_too() -> None:
    weight = _weight("half", rows=2100, columns=600)
    weight[-1, -1] = 1 / 3
    assert to_narrow(weight) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 64, 97])
@pytest.mark.parametrize("inputs", [(45,), (1, 45), (3, 1, 45), (4, 45), (5, 45), (0, 45)])
def test_linear(form: str, columns: int, inputs: tuple[int, ...]) -> None:
    dense, narrow = _linear(form, columns=columns)
    x = torch.randn(*inputs[:-1], columns)
    with torch.no_grad():
        wanted, found = dense(x), narrow(x)
        with kernels.disabled():
            plain = narrow(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(plain, wanted)  # the plain path is that of the float layer


@pytest.mark.parametrize("form", FORMS)
def test_many_tiles(form: str) -> None:
    dense, narrow = _linear(form, rows=1100, columns=1024, bias=False)
    x = torch.randn(9, 1024, requires_grad=True)
    with torch.no_grad():
        torch.testing.assert_close(narrow(x), dense(x), rtol=1e-4, atol=1e-4)
    (wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    (found,) = torch.autograd.grad(narrow(x).square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7])
def test_gradients_change_no_bit(form: str, count: int) -> None:
    _, narrow = _linear(form)
    x = torch.randn(count, 45)
    with torch.no_grad():
        wanted = narrow(x)
    assert torch.equal(narrow(x.clone().requires_grad_()), wanted)
    assert narrow.bias is not None and torch.equal(narrow(x), wanted)
    narrow(x).sum().backward()
    torch.testing.assert_close(narrow.bias.grad, torch.full((70,), float(count)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(form: str, dtype: torch.dtype) -> None:
    dense, narrow = _linear(form)
    x = torch.randn(2, 45)
    with torch.no_grad():
        wanted, found = dense(x), narrow.to(dtype)(x.to(dtype))
        usual = (dense.to(dtype)(x.to(dtype)).float() - wanted).abs().max()
    assert found.dtype == dtype
    assert (found.float() - wanted).abs().max() <= 2 * usual + 1e-6


@pytest.mark.parametrize("form", FORMS)
def test_embedding(form: str) -> None:
    dense = nn.Embedding(70, 45, padding_idx=3).eval()
    dense.weight = nn.Parameter(_weight(form))
    found = to_narrow(dense.weight)
    assert found is not None
    narrow: Any = narrowed(dense, *found)
    tokens = torch.tensor([[3, 0, 69], [5, 5, 1]])
    assert isinstance(narrow, NarrowEmbedding) and torch.equal(narrow(tokens), dense(tokens))
    assert narrow(tokens[:0]).shape == (0, 3, 45)
    assert torch.equal(widened(narrow, narrow.as_parameter())(tokens), dense(tokens))


@pytest.mark.parametrize("form", FORMS)
def test_a_state_dict_is_that_of_the_float_layer(form: str) -> None:
    dense, narrow = _linear(form)
    state = narrow.state_dict()
    assert set(state) == {"weight", "bias"} and torch.equal(state["weight"], dense.weight)
    other = copy.deepcopy(narrow)
    moved = _weight(form).flip(0)
    other.load_state_dict({**state, "weight": moved})
    assert torch.equal(other.weight, moved) and torch.equal(narrow.weight, dense.weight)
    with pytest.raises(RuntimeError, match="make the layer float first"):
        other.load_state_dict({**state, "weight": moved / 3})
    with pytest.raises(RuntimeError, match="weight"):
        other.load_state_dict({"bias": state["bias"]})


def test_tied_layers_have_one_wide_weight_at_a_time() -> None:
    dense, narrow = _linear("half")
    tied = NarrowLinear(narrow.numbers, narrow.scales, dense)
    held = narrow.weight
    assert tied.weight is held
    held.zero_()  # no parameter: the layer's own numbers do not change
    assert torch.equal(tied.weight, dense.weight)
    narrow.load_state_dict({**dense.state_dict(), "weight": _weight("half").flip(0)})
    assert torch.equal(tied.weight, _weight("half").flip(0))


def test_a_narrow_weight_is_not_trained(caplog: pytest.LogCaptureFixture) -> None:
    _, narrow = _linear("half")
    with caplog.at_level(logging.WARNING):
        narrow.train()
        narrow.train()
    assert caplog.text.count("widen_") == 1
    with pytest.raises(ConfigError, match="widen_"):
        narrow.requires_grad_()


def test_a_compiled_layer_keeps_the_operator_whole() -> None:
    dense, narrow = _linear("half")
    compiled = torch.compile(narrow, backend="eager", fullgraph=True)
    x = torch.randn(2, 45)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), dense(x), rtol=1e-5, atol=1e-5)


def test_exported() -> None:
    dense, narrow = _linear("half")
    program = torch.export.export(narrow, (torch.randn(2, 45),))
    x = torch.randn(2, 45)
    torch.testing.assert_close(program.module()(x), dense(x), rtol=1e-5, atol=1e-5)
    assert not any("narrow" in str(node.target) for node in program.graph.nodes)
