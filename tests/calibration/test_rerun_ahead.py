"""What the float network finds ahead of the fits, and outputs computed from what was found, beside whole runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin.calibration import Batch, Batches, BatchStore, Rerun
from bgd_plugin.calibration.side import Side
from bgd_plugin.graph import copy_module, module_at

WIDTH = 8
_aten: Any = torch.ops.aten


class Attention(nn.Module):
    """Returns what its last layer returns, in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out((q @ k.mT).softmax(-1) @ v), None


class Mlp(nn.Module):
    def __init__(self, last: nn.Module, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH) for _ in range(2))
        self.down, self.after = last, after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.down(torch.sigmoid(self.gate(x)) * self.up(x)))


class Layer(nn.Module):
    def __init__(self, last: nn.Module, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.attention, self.mlp = Attention(), Mlp(last, after)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norms[0](x))[0]
        y = self.mlp(self.norms[1](x))
        if isinstance(y, tuple):
            y = y[0] if y[1] is None else y[0] * y[1]
        return x + y


class Net(nn.Module):
    def __init__(self, after: Callable[[Tensor], Any] = lambda y: y, last: Any = None) -> None:
        super().__init__()
        make = last or (lambda: nn.Linear(2 * WIDTH, WIDTH, bias=False))
        self.layers = nn.ModuleList(Layer(make(), after) for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _data(*lengths: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, length, WIDTH, generator=generator) for length in lengths]


def _walk(network: nn.Module, data: list[Tensor], *, bound: int | None = None, **options: Any) -> Rerun:
    batches = Batches(BatchStore(bound))
    for x in data:
        batches.append([Batch((x,))])
    weights = {path: m.weight for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    return Rerun(copy_module(network, share_tensors=True), network, batches, weights, [], **options)


class _Literal(TorchDispatchMode):
    """Inputs and outputs of every layer in a whole run, and the other summand where the output of one is added."""

    def __init__(self, network: nn.Module, x: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inputs: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self._names = {m.weight.data_ptr(): path for path, m in network.named_modules() if isinstance(m, nn.Linear)}
        with torch.no_grad(), self:
            network(x.clone())

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        if operator in (_aten.mm.default, _aten.addmm.default) and args[-1].data_ptr() in self._names:
            name = self._names[args[-1].data_ptr()]
            self.inputs[name] = args[-2].clone()
            self.products[name] = args[-2] @ args[-1]
        return result


@torch.no_grad()
def _replace(network: nn.Module, name: str) -> None:
    """Put another layer in the place of one, as if it were quantized."""
    old = module_at(network, name)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)  # type: ignore[arg-type]
    new.weight.copy_(old.weight + 0.05 * torch.randn_like(new.weight))  # type: ignore[operator, arg-type]
    if old.bias is not None:
        new.bias.copy_(old.bias)  # type: ignore[arg-type]
    new._forward_pre_hooks, new._forward_hooks = old._forward_pre_hooks, old._forward_hooks
    module_at(network, name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = new


def _require_literal(walk: Rerun, name: str, data: list[Tensor]) -> None:
    inputs = walk.inputs(name)
    pairs = list(inputs.pairs())
    assert len(pairs) == len(data)
    for batch, (x, (mine, theirs, _)) in enumerate(zip(data, pairs, strict=True)):
        student, reference = _Literal(walk.student, x), _Literal(walk.reference, x)
        torch.testing.assert_close(mine, student.inputs[name])
        torch.testing.assert_close(theirs, reference.inputs[name])
        assert (inputs.outputs is None) is (len(walk.together(name)) > 1)
        if inputs.outputs is not None:
            torch.testing.assert_close(inputs.outputs(batch), reference.products[name])


@pytest.mark.parametrize("bound", [None, 1 << 20, 20_000, 2_000])
def test_all_that_is_found_is_what_whole_runs_find(bound: int | None) -> None:
    torch.manual_seed(0)
    data = _data(5, 5, 4, 5, 4)
    walk = _walk(Net(), data, bound=bound)
    for name in walk.order:
        _require_literal(walk, name, data)
        skip = walk.skip(name)
        assert (skip is not None) is name.endswith((".out", ".down"))
        if skip is not None:
            for batch, x in enumerate(data):
                streams = [_stream(network, name, x) for network in (walk.student, walk.reference)]
                torch.testing.assert_close(skip[0](batch), streams[1] - streams[0])
                torch.testing.assert_close(skip[1](batch), streams[1])
        _replace(walk.student, name)
    assert not walk.is_whole and not walk.strayed


@torch.no_grad()
def _stream(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """What the output of `out` or `down` in a layer is added to."""
    found: list[Tensor] = []
    number = 0 if name.endswith("out") else 1
    norm = module_at(network, f"{name.rsplit('.', 2)[0]}.norms.{number}")
    hook = norm.register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    network(x)
    hook.remove()
    return found[0]


class _Multiplications(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator in (_aten.mm.default, _aten.addmm.default, _aten.bmm.default):
            left, right = args[-2:]
            self.count += left.numel() * right.shape[-1]
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("bound", "stretches"), [(None, 4), (4_000, 7)])
def test_each_network_multiplies_once(bound: int | None, stretches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch's float network runs as often as the compressed one, so that the record can be compared."""
    network, data = Net(), _data(5, 5, 5)
    run, spent, runs = Side.run, Counter[tuple[bool, int]](), Counter[tuple[bool, int]]()

    def counting(self: Side, batch: int, *arguments: Any, **options: Any) -> Any:
        with _Multiplications() as counted:
            result = run(self, batch, *arguments, **options)
        spent[self.network is network, batch] += counted.count
        runs[self.network is network, batch] += 1
        return result

    monkeypatch.setattr(Side, "run", counting)
    walk = _walk(network, data, bound=bound)
    for name in walk.order:
        walk.inputs(name)
    with _Multiplications() as whole, torch.no_grad():
        network(data[0])
    assert max(count for (is_reference, batch), count in spent.items() if batch or not is_reference) <= whole.count
    groups = 3 * 4 + 1
    assert [runs[False, batch] for batch in range(3)] == [groups] * 3 and runs[True, 0] == groups
    assert runs[True, 1] == runs[True, 2] == stretches


def test_no_more_is_held_than_later_runs_need() -> None:
    data = _data(5, 5)
    walk = _walk(Net(), data)
    for name in walk.order:
        walk.inputs(name)
        for batch in range(len(data)):
            entries = walk.batches.store.open(batch)
            kept = [path for entry, held in entries.items() if entry.endswith(" kept") for path in held]
            assert not [path for path in kept if ".attention." in path or ".mlp." in path]
            found = [name for entry, held in entries.items() if entry.endswith(" found") for name in held["calls"]]
            assert min(map(walk.order.index, found)) == walk.order.index(walk.together(name)[0])
            if name.endswith("gate"):
                assert kept.count(name.replace("mlp.gate", "attention")) == (2 if not batch else 1)


def _hooked(kind: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.Linear(2 * WIDTH, WIDTH)
        if kind == "changes the output":
            layer.register_forward_hook(lambda _m, _a, y: 2 * y)
        elif kind == "writes to the output":
            layer.register_forward_hook(lambda _m, _a, y: y.mul_(2))
        elif kind == "changes the input":
            layer.register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
        elif kind == "writes to the input":
            layer.register_forward_pre_hook(lambda _m, args: (args[0].add_(1), None)[1])
        return layer

    return build


class Turned(nn.Linear):
    """Computes on another order of its argument's values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT.contiguous().mT.flip(1))


class Named(nn.Module):
    """Its layer takes the input by name, and beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=x)


AFTER: dict[str, Callable[[Tensor], Any]] = {
    "nothing": lambda y: y,
    "tuple": lambda y: (y, None),
    "number": lambda y: (y, 1.5),
    "two": lambda y: (y, y),
    "dropout": nn.Dropout().eval(),
    "scaled": lambda y: 0.5 * y,
    "in place": lambda y: y.mul_(0.5),
    "view": lambda y: y.view(-1).view(y.shape),
    "part": lambda y: y[..., :WIDTH].clone(),
}
LAST: dict[str, Callable[[], nn.Module]] = {
    **{kind: _hooked(kind) for kind in ("changes the output", "writes to the output")},
    **{kind: _hooked(kind) for kind in ("changes the input", "writes to the input")},
    "turned": lambda: Turned(2 * WIDTH, WIDTH),
    "named": Named,
}


@pytest.mark.parametrize(("after", "last"), [(name, "plain") for name in AFTER] + [("nothing", name) for name in LAST])
def test_what_a_module_returns_is_not_taken_for_its_layers_output_where_it_is_another(after: str, last: str) -> None:
    torch.manual_seed(0)
    data = _data(5, 5, 5)
    walk = _walk(Net(AFTER[after], LAST.get(last)).eval(), data)
    for name in walk.order:
        pairs = list(walk.inputs(name).pairs())
        for x, (mine, theirs, _) in zip(data, pairs, strict=True):
            torch.testing.assert_close(mine, _Literal(walk.student, x).inputs[name])
            torch.testing.assert_close(theirs, _Literal(walk.reference, x).inputs[name])
        if last != "turned" or not name.endswith("down"):
            _replace(walk.student, name)
    assert not walk.is_whole


_LEFT: dict[str, Tensor] = {}


class Leaves(nn.Module):
    """The first of two blocks leaves its input where nobody looks, for the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = Attention(), Attention()
        self.one.register_forward_pre_hook(lambda _, args: _LEFT.update(x=args[0] * 2))

    def forward(self, x: Tensor) -> Tensor:
        _LEFT["x"] = torch.zeros_like(x)
        y, _ = self.one(x)
        z, _ = self.two(y + _LEFT["x"])
        return x + z


def test_a_value_left_aside_in_a_stretch_is_noticed_on_the_batch_that_was_recorded() -> None:
    torch.manual_seed(0)
    data = _data(5, 5, 5)
    walk = _walk(nn.Sequential(Leaves(), nn.Linear(WIDTH, WIDTH)).eval(), data)
    assert walk.records.runs[1].is_borrowed
    for name in walk.order:
        pairs = list(walk.inputs(name).pairs())
        for x, (mine, theirs, _) in zip(data, pairs, strict=True):
            torch.testing.assert_close(mine, _Literal(walk.student, x).inputs[name])
            torch.testing.assert_close(theirs, _Literal(walk.reference, x).inputs[name])
        _replace(walk.student, name)
    assert walk.is_whole


def test_layers_may_be_asked_for_again_and_blocks_in_between() -> None:
    torch.manual_seed(0)
    data = _data(5, 5)
    walk = _walk(Net(), data)
    later, earlier = "layers.1.mlp.down", "layers.0.attention.out"
    for name in (earlier, later, later, "layers.0.attention.q", earlier, "layers.1.mlp.gate", later):
        _require_literal(walk, name, data)
    with torch.no_grad():
        for path in ("layers.1.mlp", "layers.2"):
            for x, ((arguments, _), answer) in zip(data, walk.block_runs(path), strict=True):
                found = _given(walk.reference, path, x)
                torch.testing.assert_close(arguments[0], found)
                torch.testing.assert_close(answer, module_at(walk.reference, path)(found))
    for name in ("layers.2.mlp.gate", "layers.2.mlp.down"):
        _require_literal(walk, name, data)
        assert len(walk.block_runs("layers.2.mlp" if name.endswith("gate") else "layers.2.mlp.down")) == 2
        _require_literal(walk, name, data)
    assert len(walk.block_runs("layers.0")) == 2 and not walk.is_whole


@torch.no_grad()
def _given(network: nn.Module, path: str, x: Tensor) -> Tensor:
    found: list[Tensor] = []
    hook = module_at(network, path).register_forward_pre_hook(lambda _, args: found.append(args[0].clone()))
    network(x)
    hook.remove()
    return found[0]


def test_a_network_beside_itself_goes_ahead_unless_its_answer_is_asked_for() -> None:
    torch.manual_seed(0)
    network, data = Net(), _data(5, 5)
    batches = [Batch((x,)) for x in data]
    weights = {path: m.weight for path, m in network.named_modules() if isinstance(m, nn.Linear)}
    for finishes in (False, True):
        walk = Rerun(network, network, Batches.of(batches), weights, [], finishes=finishes)
        for name in walk.order:
            _require_literal(walk, name, data) if not finishes else walk.inputs(name)
            if finishes:
                weight = module_at(network, name).weight
                with torch.no_grad():  # as if the layer were quantized, as long as its loss is measured
                    weight.mul_(2)  # type: ignore[operator]
                    for batch, x in enumerate(data):
                        torch.testing.assert_close(walk.finish(batch), network(x))
                    weight.div_(2)  # type: ignore[operator]
