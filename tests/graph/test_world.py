"""What a network's code writes outside of it is put back after a call."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from tests.networks import PlainNet, em, vectors

SEEN: dict[str, Any] = {}
CALLS = 0


class _Recorder:
    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.count = 0

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.outputs.append(output)
        self.count += 1


class _Writing(PlainNet):
    """Writes wherever a forward can write; `branches` makes it a network that does not trace."""

    calls = 0
    shared: list[int] = []  # noqa: RUF012 (that is what is tested)

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.cache: dict[str, Any] = {}
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        type(self).calls += 1
        self.shared.append(1)
        SEEN["x"] = x
        self.cache["x"] = x
        self.count += 1
        return super().forward(x if not self.branches or x.sum() > -1e9 else -x)


CALLS_OF_THE_LIBRARY: dict[str, Callable[[nn.Module], object]] = {
    "plan": bgd.plan,
    "quantize": lambda m: bgd.quantize(m, vectors(), em(), progress=False),
    "trained": lambda m: bgd.quantize(
        m,
        vectors(),
        em(distillation=bgd.DistillationConfig(steps=2), finetuning=bgd.FinetuningConfig(steps=2)),
        progress=False,
    ),
    "weights": lambda m: bgd.quantize_weights(m, em()),
}


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("call", CALLS_OF_THE_LIBRARY)
def test_nothing_that_code_reaches_moves(call: str, branches: bool) -> None:
    kept: dict[str, Any] = {"before": 1}
    last, counts, total, recorder = deque([1], maxlen=3), Counter("a"), torch.zeros(()), _Recorder()
    count = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        nonlocal count
        count += 1
        kept["output"] = output
        last.append(2)
        counts["a"] += 1
        total.add_(1)

    model = _Writing(branches).eval()
    for module in (model, model[0]):
        module.register_forward_hook(hook)
        module.register_forward_hook(recorder)
    CALLS_OF_THE_LIBRARY[call](model)
    assert kept == {"before": 1}
    assert (list(last), counts, float(total), count) == ([1], Counter("a"), 0.0, 0)
    assert (recorder.outputs, recorder.count) == ([], 0)
    assert (SEEN, CALLS, _Writing.calls, _Writing.shared) == ({}, 0, 0, [])
    assert (model.cache, int(model.count)) == ({}, 0)


MODES: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


def _state() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_default_device(),
    )


@pytest.mark.parametrize("mode", [*MODES, "double"])
def test_the_callers_modes_change_neither_the_result_nor_themselves(mode: str) -> None:
    model, data = PlainNet().eval(), vectors()
    config = bgd.BGDConfig(
        finetuning=bgd.FinetuningConfig(steps=2), distillation=bgd.DistillationConfig(steps=2), max_divergence=None
    )
    wanted = bgd.quantize(model, data, config, progress=False).model.state_dict()
    before = torch.get_default_dtype()
    try:
        if mode == "double":
            torch.set_default_dtype(torch.float64)
        with MODES.get(mode, torch.enable_grad)():
            state = _state()
            found = bgd.quantize(model, data, config, progress=False).model
            assert _state() == state
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(value, wanted[name]) for name, value in found.state_dict().items())
    found(data[0]).sum().backward()  # it can be trained


class _Factory(OrderedDict[str, Any]):
    """A table of classes that gives a new object at each look, as transformers' activations are."""

    def __getitem__(self, key: str) -> Any:
        return super().__getitem__(key)()


TABLE = _Factory(relu=nn.ReLU, gelu=nn.GELU)


class _Looking(PlainNet):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(TABLE["relu"](input))


def test_a_table_that_makes_its_values_anew_is_left_as_it_is() -> None:
    bgd.quantize(_Looking().eval(), vectors(), em(), progress=False)
    assert dict(dict.items(TABLE)) == {"relu": nn.ReLU, "gelu": nn.GELU}
