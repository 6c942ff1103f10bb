"""What one look at a network finds, and what later steps change in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.graph import front_end
from bgd_plugin.planning.survey import Survey, is_finished, surveyed
from tests.networks import PlainNet, em, vectors


class _Kinds(nn.Module):
    """A first layer, a depthwise one, a table of rows that a linear layer shares, and layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.conv = nn.Conv1d(16, 32, 3, padding=1)
        self.depthwise = nn.Conv1d(32, 32, 3, padding=1, groups=32)
        self.back = nn.Linear(32, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.conv(self.words(x).transpose(1, 2))).transpose(1, 2)
        return self.head(self.back(x))


def _surveyed(model: nn.Module, config: BGDConfig | None = None, **fields: Any) -> Survey:
    model = model.eval()
    return surveyed(front_end(model), config or BGDConfig(max_divergence=None), original=model, **fields)


def test_leftovers_are_the_weights_whose_kind_has_no_setting() -> None:
    """Not a shared one, and none that an override keeps float."""
    survey = _surveyed(_Kinds())
    assert survey.leftovers == ("depthwise.weight",)
    assert [layer.name for layer in survey.layers] == ["conv", "back"]
    assert _surveyed(_Kinds(), BGDConfig(overrides=(("depthwise", None),), max_divergence=None)).leftovers == ()
    plain = _surveyed(PlainNet())
    assert plain.leftovers == ("0.weight",)


class _Tied(nn.Sequential):
    """The first two layers share a weight, so that the first one is not rounded alone."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 40))
        self[1].weight = self[0].weight


def test_a_first_layer_that_shares_its_weight_is_no_leftover() -> None:
    assert _surveyed(_Tied()).leftovers == ()


def test_layers_with_open_sizes_are_free() -> None:
    """A default leaves both sizes open, a block size fixes the layer, a codebook size leaves the block size open."""
    overrides = (("2", LayerConfig(block_size=8)), ("4", LayerConfig(codebook_size=8)))
    model = nn.Sequential(*(nn.Linear(16, 64) if i in (0, 2, 4, 6) else nn.Linear(64, 16) for i in range(8)))
    survey = _surveyed(model, BGDConfig(overrides=overrides))
    assert {layer.name for layer in survey.layers} - set(survey.free) == {"2"}
    assert survey.free["4"].codebook_size == 8


@pytest.mark.parametrize("most_is_frozen", [False, True])
def test_frozen_parameters_of_a_trained_network_are_tables(most_is_frozen: bool) -> None:
    """Where most of the network is frozen, that says nothing of a parameter; one parameter under two names is one."""

    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(900), requires_grad=False)
            self.again = self.table

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + self.table[:12] + self.again[:12])

    model = Net()
    if most_is_frozen:
        model[2].weight.requires_grad_(False)
    assert sum(p.numel() for p in PlainNet().parameters()) < 2 * 900
    assert _surveyed(model).tables == (frozenset() if most_is_frozen else {"table", "again"})


def test_weights_that_are_never_used_and_layers_that_are_left_are_told() -> None:
    class Net(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            for layer in list(self)[:5]:
                x = layer(x)
            return x

    class Graphed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    skipped = {skipped.name: skipped.reason for skipped in _surveyed(Graphed()).skipped}
    assert skipped["inner.0"] == "first_layer=None"
    assert skipped.get("inner.spare.weight") == "not used in evaluation mode"
    assert "inner.spare.bias" not in skipped


def test_leaving_layers_out_keeps_what_was_known_of_the_others() -> None:
    survey = _surveyed(PlainNet(), BGDConfig()).noted("first").noted("second")
    assert survey.notes == ("first", "second")
    less = survey.without({"2": "too hard"})
    assert [layer.name for layer in less.layers] == ["4"] and set(less.free) == {"4"}
    assert [(s.name, s.reason) for s in less.skipped] == [("0", "first_layer=None"), ("2", "too hard")]
    assert less.notes == survey.notes


def test_a_budget_adds_what_it_chose_to_what_was_known() -> None:
    survey = _surveyed(PlainNet(), BGDConfig()).noted("first")
    spent = survey.budgeted(survey.chosen[:1], {"4": "the budget has room for it in float"}, ("spent",), 0.25)
    assert spent.notes == ("first", "spent") and spent.expected_divergence == 0.25
    assert [layer.name for layer in spent.layers] == ["2"]
    assert [(s.name, s.reason) for s in spent.skipped][1:] == [("4", "the budget has room for it in float")]


def test_bytes_of_an_earlier_network_may_be_the_same_but_not_fewer() -> None:
    own = sum(4 * p.numel() for p in PlainNet().parameters())
    assert _surveyed(PlainNet()).original_bytes == _surveyed(PlainNet(), original_bytes=own).original_bytes == own
    assert _surveyed(PlainNet(), original_bytes=own + 1).original_bytes == own + 1
    with pytest.raises(ConfigError, match="cannot have been pruned from a smaller one"):
        _surveyed(PlainNet(), original_bytes=own - 1)


def test_a_pattern_may_name_a_layer_that_is_left() -> None:
    model = nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 5), nn.Bilinear(5, 5, 5))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            x = self.parts[1](self.parts[0](x))
            return self.parts[2](x, x)

    left = [skipped.name for skipped in _surveyed(Net()).skipped if "parts.2" in skipped.name]
    assert left
    _surveyed(Net(), BGDConfig(overrides=((left[0], None),)))
    with pytest.raises(ConfigError, match="override 'nothing' matches no layer"):
        _surveyed(Net(), BGDConfig(overrides=(("nothing", None),)))


def test_a_network_is_finished_once_nothing_is_left_that_the_settings_would_quantize() -> None:
    model, config = PlainNet().eval(), em(overrides=(("4", None),))
    assert not is_finished(model, config)
    half = bgd.quantize(model, vectors(), config, progress=False).model
    assert is_finished(half, config)
    assert not is_finished(half, em())
    # with a bound, a free layer that is float is one that was left so; a layer with sizes of its own is not
    assert is_finished(half, BGDConfig())
    assert not is_finished(half, BGDConfig(overrides=(("4", LayerConfig(block_size=4)),)))
