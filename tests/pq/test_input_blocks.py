"""`input_blocks` holds the same blocks as the unfolded inputs."""

import pytest
import torch

from bgd_plugin.pq.blocks import Geometry, input_blocks, unfold_inputs


@pytest.mark.parametrize("kernel", [(3,), (3, 3), (1, 1), (2, 3), (1, 2, 2)])
@pytest.mark.parametrize("channels_per_block", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_same_gram_as_unfolded(kernel: tuple[int, ...], channels_per_block: int, groups: int) -> None:
    x = torch.randn(2, 8, *(6 for _ in kernel), dtype=torch.float64)
    geometry = Geometry.of(kernel, 2, 1, 1, groups)
    block_size = channels_per_block * int(torch.tensor(kernel).prod())
    blocks = input_blocks(x, geometry, block_size)
    expected = unfold_inputs(x, geometry).reshape(-1, block_size)
    assert blocks.shape == expected.mT.shape
    torch.testing.assert_close(blocks @ blocks.mT, expected.mT @ expected)
    torch.testing.assert_close(blocks.sum(1), expected.sum(0))


def test_blocks_that_cut_a_channel() -> None:
    x = torch.randn(2, 3, 7, 7)
    geometry = Geometry.of((5, 5), 1, 2, 1, 1)
    expected = unfold_inputs(x, geometry).reshape(-1, 5)
    assert torch.equal(input_blocks(x, geometry, 5), expected.mT)
