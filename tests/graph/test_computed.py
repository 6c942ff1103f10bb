"""A parameter that a module computes, under its own name or under that of the module."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bgd_plugin.graph.computed import compute_parameter_, loosen_parameter_, restore_parameter_, set_apart_
from bgd_plugin.nn import FloatWeight


def test_a_computed_parameter_can_be_loosened_and_computed_again() -> None:
    layer, other = nn.Bilinear(3, 4, 5), nn.Bilinear(3, 4, 5)
    kind, weight = type(layer), layer.weight
    computing = FloatWeight(weight)
    inputs = torch.randn(2, 3), torch.randn(2, 4)
    expected = layer(*inputs)
    compute_parameter_(layer, "weight", computing)
    names = list(layer.state_dict())
    loosen_parameter_(layer, "weight")
    assert type(layer) is kind
    assert layer.get_submodule("weight") is computing and list(layer.state_dict()) == names
    compute_parameter_(layer, "weight", computing)
    assert torch.equal(layer(*inputs), expected) and layer.weight is weight
    restore_parameter_(layer, "weight", weight)
    assert type(layer) is kind and dict(layer.named_parameters()).keys() == dict(other.named_parameters()).keys()
    assert torch.equal(layer(*inputs), expected)


def test_of_two_computed_parameters_one_can_be_loosened() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=4, vdim=4, batch_first=True).eval()
    computing = {name: FloatWeight(getattr(layer, name)) for name in ("q_proj_weight", "k_proj_weight")}
    for name, module in computing.items():
        compute_parameter_(layer, name, module)
    loosen_parameter_(layer, "k_proj_weight")
    assert layer.q_proj_weight is computing["q_proj_weight"].weight
    assert layer.get_submodule("k_proj_weight") is computing["k_proj_weight"]


class _Counting(nn.Module):
    """Returns a weight that is computed anew at each call, and counts the calls."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.part = nn.Parameter(weight.detach() / 2)
        self.calls = 0

    def forward(self) -> torch.Tensor:
        self.calls += 1
        return 2 * self.part


class _ReadsTwice(nn.Module):
    """Reads its weight twice, and calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))

    def forward(self, x: torch.Tensor, again: bool = True) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("no numbers")
        x = x @ self.weight + self.weight.sum()
        return self(x, again=False) if again else x


def _counted(owner: nn.Module, name: str = "weight") -> _Counting:
    module = _Counting(getattr(owner, name))
    compute_parameter_(owner, name, module)
    return module


def test_one_call_computes_a_parameter_once_and_the_next_call_computes_it_anew() -> None:
    layer = _ReadsTwice()
    plain, x = copy.deepcopy(layer), torch.randn(2, 3)
    module = _counted(layer)
    assert torch.equal(layer(x), plain(x)) and module.calls == 1
    with torch.no_grad():
        module.part += 1
        plain.weight += 2
    assert torch.allclose(layer(x), plain(x)) and module.calls == 2
    assert layer.weight is not layer.weight  # outside of a call nothing is kept


def test_nothing_is_kept_after_a_call_that_failed() -> None:
    layer = _ReadsTwice()
    module = _counted(layer)
    with pytest.raises(ValueError, match="no numbers"):
        layer(torch.full((2, 3), torch.nan))
    layer(torch.zeros(2, 3))
    layer(torch.zeros(2, 3))
    assert module.calls == 2


def test_gradients_of_all_reads_add_up() -> None:
    layer = _ReadsTwice()
    plain, x = copy.deepcopy(layer), torch.randn(2, 3)
    module = _counted(layer)
    layer(x).square().sum().backward()
    plain(x).square().sum().backward()
    assert module.part.grad is not None and plain.weight.grad is not None
    torch.testing.assert_close(module.part.grad, 2 * plain.weight.grad)


@pytest.mark.parametrize("training", [False, True])
def test_attention_and_recurrent_layers_decode_once(training: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).train(training)
    lstm = nn.LSTM(8, 4).train(training)
    x = torch.randn(1, 5, 8)
    modules = [_counted(attention, "in_proj_weight"), _counted(lstm, "weight_ih_l0"), _counted(lstm, "weight_hh_l0")]
    with torch.set_grad_enabled(training):
        attention(x, x, x, need_weights=False)
        lstm(x)
    assert [module.calls for module in modules] == [1, 1, 1]


def test_threads_do_not_share_what_they_have_read() -> None:
    layer = _ReadsTwice()
    module, plain = _counted(layer), _ReadsTwice()
    plain.weight = nn.Parameter(2 * module.part.detach())
    inputs = [torch.randn(2, 3) for _ in range(32)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda x: layer(x).detach(), inputs))
    assert all(torch.equal(own, plain(x)) for own, x in zip(found, inputs, strict=True))


def test_it_compiles_and_exports() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    plain, x = copy.deepcopy(layer), torch.randn(1, 5, 8)
    _counted(layer, "in_proj_weight")
    expected = plain(x, x, x, need_weights=False)[0]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, x, x, need_weights=False)[0], expected)
    set_apart_(layer)
    program = torch.export.export(layer, (x, x, x), {"need_weights": False})
    torch.testing.assert_close(program.module()(x, x, x, need_weights=False)[0], expected)
