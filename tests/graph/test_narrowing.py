"""Large float weights are held narrow where nothing else reads them, and are float again on request."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph import narrow_, widen_
from bgd_plugin.nn import NarrowEmbedding, NarrowLinear, NarrowModule

CONFIG = bgd.BGDConfig(
    linear=bgd.LayerConfig(block_size=4, codebook_size=16), overrides=(("head", None),), max_divergence=None
)
TOKENS = torch.tensor([[1, 2, 3], [4000, 0, 7]])


class Tied(nn.Module):
    """A table whose rows are looked up, a layer, and a head with the table as its weight."""

    def __init__(self, rows: int = 4096, width: int = 256) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        self.layer = nn.Linear(width, width)
        self.head = nn.Linear(width, rows, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens `[...]` to `[..., rows]`."""
        output: Tensor = self.head(self.layer(self.table(tokens)))
        return output


class ReadsTable(Tied):
    """The table is a parameter of the network itself, too."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.table.weight


def _rounded(network: Any) -> Any:
    with torch.no_grad():
        network.table.weight.copy_(network.table.weight.half())
    return network.eval()


def _saved(network: nn.Module, folder: Path) -> tuple[Any, Path]:
    small: Any = bgd.quantize_weights(network, CONFIG).model
    path = folder / "net.safetensors"
    bgd.save(small, path)
    return small, path


def test_a_loaded_network_is_as_narrow_as_its_file(tmp_path: Path) -> None:
    network = Tied().eval()
    small, path = _saved(network, tmp_path)
    loaded: Any = bgd.load(path, like=network)
    assert isinstance(loaded.table, NarrowEmbedding) and isinstance(loaded.head, NarrowLinear)
    assert loaded.table.numbers is loaded.head.numbers
    held = {t.data_ptr(): t.nbytes for t in (*loaded.parameters(), *loaded.buffers())}
    assert sum(held.values()) < 1.05 * os.path.getsize(path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS), small(TOKENS), rtol=1e-5, atol=1e-5)


def test_what_was_loaded_is_saved_with_the_same_bytes(tmp_path: Path) -> None:
    network = Tied().eval()
    _, path = _saved(network, tmp_path)
    bgd.save(bgd.load(path, like=network), tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_materialize_and_state_dict(tmp_path: Path) -> None:
    network = Tied().eval()
    small, path = _saved(network, tmp_path)
    loaded: Any = bgd.load(path, like=network)
    dense: Any = bgd.materialize(loaded)
    assert type(dense.table) is nn.Embedding and dense.head.weight is dense.table.weight
    assert isinstance(dense.head.weight, nn.Parameter) and dense.head.weight.requires_grad
    assert isinstance(loaded.table, NarrowEmbedding)  # the caller's network is as before
    assert all(torch.equal(value, small.state_dict()[name]) for name, value in loaded.state_dict().items())
    network.load_state_dict(dense.state_dict())


def test_a_network_to_be_trained_stays_float(tmp_path: Path) -> None:
    network = Tied().eval()
    _, path = _saved(network, tmp_path)
    loaded: Any = bgd.load(path, like=network.train())
    assert type(loaded.table) is nn.Embedding and loaded.head.weight is loaded.table.weight


def test_eight_bits(tmp_path: Path) -> None:
    network = Tied().eval()
    small, path = _saved(network, tmp_path)
    from bgd_plugin.files.rounding import round_weights_

    round_weights_(small, {"head.weight": "int8"})
    small.table.weight = small.head.weight
    bgd.save(small, path)
    loaded: Any = bgd.load(path, like=network)
    assert loaded.head.numbers.dtype == torch.int8
    assert torch.equal(loaded.head.weight, small.head.weight)
    bgd.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_network_can_be_planned_and_quantized(tmp_path: Path) -> None:
    network = Tied().eval()
    _, path = _saved(network, tmp_path)
    loaded: Any = bgd.load(path, like=network)
    again = bgd.BGDConfig(embedding=bgd.LayerConfig(block_size=4, codebook_size=16), overrides=(), max_divergence=None)
    assert "table" in str(bgd.plan(loaded, again)) or "head" in str(bgd.plan(loaded, again))
    result = bgd.quantize_weights(loaded, again)
    assert not any(isinstance(module, NarrowModule) for module in result.model.modules())
    assert isinstance(loaded.table, NarrowEmbedding)


@pytest.mark.parametrize("kind", ["reads", "forward", "max_norm", "small", "subclass", "single precision"])
def test_what_is_left_float(kind: str) -> None:
    network: Any = ReadsTable() if kind == "reads" else Tied(rows=64 if kind == "small" else 4096)
    _rounded(network)
    if kind == "forward":
        own = network.head.forward
        network.head.forward = lambda x: own(x) * 2
    elif kind == "max_norm":
        network.table.max_norm = 1.0
    elif kind == "subclass":
        network.head.__class__ = type("Head", (nn.Linear,), {})
    elif kind == "single precision":
        with torch.no_grad():
            network.table.weight[-1, -1] = 1 / 3
    narrow_(network)
    assert type(network.table) is nn.Embedding and network.head.weight is network.table.weight


def test_hooks_and_attributes_stay() -> None:
    network = _rounded(Tied())
    network.head.note = "kept"
    seen = []
    network.head.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    narrow_(network)
    with torch.no_grad():
        network(TOKENS)
        assert network.head.note == "kept" and seen == [NarrowLinear]
        widen_(network)(TOKENS)
    assert network.head.note == "kept" and seen == [NarrowLinear, nn.Linear]
    assert network.head.weight is network.table.weight


def test_a_graph_stays_as_it_is() -> None:
    graph: Any = torch.fx.symbolic_trace(_rounded(Tied()))
    assert not any(isinstance(module, NarrowModule) for module in narrow_(graph.eval()).modules())
