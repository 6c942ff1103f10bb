"""When an operator on a tensor runs here and now."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin.support.direct import runs_directly


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        return operator(*args, **(kwargs or {}))


class _Own(Tensor):
    pass


def test_plain_tensors_and_parameters_do() -> None:
    assert runs_directly(torch.zeros(2))
    assert runs_directly(torch.nn.Parameter(torch.zeros(2)))
    with torch.inference_mode():
        assert runs_directly(torch.zeros(2))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_what_somebody_watches_does_not() -> None:
    x = torch.zeros(2)
    assert not runs_directly(x.as_subclass(_Own))
    assert not runs_directly(torch.zeros(2, device="meta"))
    with _Mode():
        assert not runs_directly(x)
    with torch.autocast("cpu"):
        assert not runs_directly(x)
    with forward_ad.dual_level():
        assert not runs_directly(x)
    seen = []
    torch.func.vmap(lambda row: seen.append(runs_directly(row)) or row)(torch.zeros(2, 2))
    torch.jit.trace(lambda row: seen.append(runs_directly(row)) or row, x, check_trace=False)
    assert not any(seen)
    assert runs_directly(x)
