"""Random orthogonal matrices."""

import torch

from bgd_plugin.rotation.matrices import orthogonal


def test_they_are_orthogonal_and_keep_the_mean() -> None:
    for fixes_mean in (False, True):
        matrix = orthogonal(12, torch.Generator().manual_seed(0), fixes_mean=fixes_mean)
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(12, dtype=torch.float64))
        ones = torch.ones(12, dtype=torch.float64)
        assert torch.allclose(ones @ matrix, ones) == fixes_mean
