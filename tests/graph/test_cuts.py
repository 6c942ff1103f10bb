"""Networks cut into blocks: the pieces, one after another, are the network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.graph import block_module, find_layers, isolate_weights_, partition, trace
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, images, randomized, vectors


class _BatchSizeNet(nn.Module):
    """Reads the batch size at the beginning and needs it at the end; two residual blocks of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.size(0)
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x.mean((2, 3)).view(count, -1))


NETWORKS = {
    "resnet": (SmallResNet, images(2)),
    "plain": (PlainNet, vectors(2)),
    "functional": (FunctionalNet, images(2, size=12)),
    "shared": (TwiceNet, vectors(2)),
    "batch size": (_BatchSizeNet, images(2)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_blocks_one_after_another_are_the_network(name: str) -> None:
    kind, data = NETWORKS[name]
    model = randomized(kind()).eval()
    graph_module = trace(model)
    found, _ = find_layers(graph_module)
    isolate_weights_(graph_module, found)
    blocks = partition(graph_module, [layer.target for layer in found])
    value = data[0].clone()
    for block in blocks:
        value = block_module(graph_module, block)(value)
    assert torch.equal(value, graph_module(data[0].clone()))
    assert list(dict.fromkeys(layer for block in blocks for layer in block.layers)) == [layer.target for layer in found]


def test_a_residual_block_stays_whole() -> None:
    graph_module = trace(_BatchSizeNet().eval())
    layers = [layer.target for layer in find_layers(graph_module)[0]]
    parts = [block.layers for block in partition(graph_module, layers)]
    assert parts == [("first",), ("blocks.0.0", "blocks.0.2"), ("blocks.1.0", "blocks.1.2"), ("last",)]


def test_chains_go_together_by_their_numbered_module() -> None:
    def block() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    graph_module = trace(nn.Sequential(nn.Sequential(block(), block()), nn.Linear(4, 4), nn.Linear(4, 4)).eval())
    layers = [layer.target for layer in find_layers(graph_module)[0]]
    parts = [block.layers for block in partition(graph_module, layers)]
    assert parts == [("0.0.0", "0.0.2", "0.1.0", "0.1.2"), ("1", "2")]
