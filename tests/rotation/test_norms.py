"""Norms are told by what they compute."""

import torch
from torch import Tensor, nn

from bgd_plugin.rotation.norms import affine_of, may_be_norm, neutralize_
from tests.rotation.networks import WIDTH, RMSNorm, layer_norm


def test_gain_and_shift_are_found() -> None:
    torch.manual_seed(0)
    norm = layer_norm()
    affine = affine_of(norm)
    assert affine is not None
    torch.testing.assert_close(affine.gain.float(), norm.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(affine.shift.float(), norm.bias.detach(), rtol=1e-4, atol=1e-5)
    plus = RMSNorm(one_plus=True)
    affine = affine_of(plus)
    assert affine is not None and not affine.has_shift
    torch.testing.assert_close(affine.gain.float(), 1 + plus.weight.detach(), rtol=1e-4, atol=1e-5)


def test_norms_become_neutral() -> None:
    for norm in (RMSNorm(), RMSNorm(one_plus=True), layer_norm()):
        assert neutralize_(norm)
        affine = affine_of(norm)
        assert affine is not None and not affine.has_shift
        torch.testing.assert_close(affine.gain, torch.ones_like(affine.gain), rtol=1e-5, atol=1e-5)


class Gate(nn.Module):
    """A vector, but no norm."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_what_has_a_vector_and_is_no_norm() -> None:
    assert may_be_norm(Gate())
    assert affine_of(Gate()) is None
    assert not may_be_norm(nn.Linear(4, 4))
    assert not may_be_norm(nn.BatchNorm1d(4))  # statistics of its own
