"""Networks that are no graph: what a run up to a layer computes, and that it comes to what a whole run comes to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bgd_plugin as bgd
from bgd_plugin.calibration import Rerun, collect_batches, paired_pieces
from bgd_plugin.calibration.branch import BranchEnd
from bgd_plugin.calibration.pieces import Pieces
from bgd_plugin.fitting import method_full_gram as full_gram
from bgd_plugin.graph import copy_module, find_layers
from tests.networks import randomized, same_outputs, vectors
from tests.rotation.networks import Model, words

WIDTH = 16


def untraceable(x: Tensor) -> None:
    """Stops the tracer: what a network does depends on a value."""
    if float(x.detach().abs().sum()) < 0:
        raise ValueError("cannot be")


class Block(nn.Module):
    """Three projections of one input, a mix of them, a projection, a skip."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b, self.c = (nn.Linear(width, 2 * width, bias=False) for _ in range(3))
        self.out = nn.Linear(2 * width, width)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        mixed = torch.tanh(self.a(y)) * self.b(y) + self.c(y)
        return x + self.out(mixed if scale is None else mixed * scale.mean())


class Chain(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        untraceable(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class EncoderDecoder(nn.Module):
    """Every block of the decoder reads what the encoder gave."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(Block(), Block())
        self.decoder = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        memory = self.encoder(x)
        untraceable(memory)
        for block in self.decoder:
            x = block(x, scale=memory)
        return {"logits": x, "memory": memory}


class Shared(nn.Module):
    """One block several times, and a head tied to a layer in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(WIDTH, WIDTH), Block()
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.relu(self.stem(x)))
        untraceable(x)
        return self.head(self.block(torch.tanh(self.tied(x))))


class InPlace(nn.Module):
    """A block that writes to what it is given, which the network reads afterwards."""

    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.relu_())

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.writes, self.after = nn.Linear(WIDTH, WIDTH), self.Writes(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        untraceable(x)
        return self.after(self.writes(x) + x)


class Aside(nn.Module):
    """A block leaves a value on itself that a later one reads: its output cannot stand for its run."""

    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.value: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.value = self.linear(x) + x.mean(0)
            return torch.tanh(self.value)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.leaves, self.middle, self.after = self.Leaves(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.leaves.value = torch.zeros_like(x)
        y = self.middle(self.leaves(self.stem(x)))
        untraceable(y)
        return self.after(y + self.leaves.value)


class Routed(nn.Module):
    """Experts of which each sees some of the samples, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU()) for _ in range(3))
        self.out = nn.Linear(2 * WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.router(x).argmax(1)
        result = x.new_zeros(len(x), 2 * WIDTH)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero().flatten()
            if len(mine):
                result[mine] = expert(x[mine])
        return self.out(result)


class Normed(nn.Module):
    """Batch norms between layers, in blocks and outside of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(inplace=True)) for _ in range(2))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        untraceable(x)
        return self.blocks(x) + x


NETWORKS = [Chain, EncoderDecoder, Shared, InPlace, Aside, Routed, Normed]


def data() -> list[Tensor]:
    return vectors(features=WIDTH, batch=24)


def rerun(network: nn.Module, batches: list[Any], **options: Any) -> Rerun:
    student = copy_module(network)
    weights = {layer.name: layer.weight for layer in find_layers(student)[0]}
    held = collect_batches(batches, network, device=torch.device("cpu"), forward=None)
    return Rerun(student, copy_module(student, share_tensors=True), held, weights, [], **options)


@pytest.mark.parametrize("build", NETWORKS)
@pytest.mark.parametrize("method", ["full", "em"])
def test_what_modules_gave_stands_for_their_runs(build: Callable[[], nn.Module], method: str, monkeypatch: Any) -> None:
    network = randomized(build())
    config = bgd.BGDConfig(method=method, max_divergence=None)  # type: ignore[arg-type]
    result = bgd.quantize(network, data(), config, progress=False)
    monkeypatch.setattr(Pieces, "finished", lambda self, place: set())
    whole = bgd.quantize(network, data(), config, progress=False)
    assert len(result.report.layers) >= 2
    if build is EncoderDecoder:
        assert all(torch.allclose(result.model(x)["logits"], whole.model(x)["logits"], atol=1e-5) for x in data())
    else:
        assert same_outputs(result.model, whole.model, data())


def test_a_value_that_a_module_leaves_aside_is_noticed_and_said() -> None:
    result = bgd.quantize(randomized(Aside()), data(), bgd.BGDConfig(max_divergence=None), progress=False)
    assert any("whole network was run" in note for note in result.report.notes)
    plain = bgd.quantize(randomized(InPlace()), data(), bgd.BGDConfig(max_divergence=None), progress=False)
    assert not any("whole network was run" in note for note in plain.report.notes)


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products, and operators."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.multiplications = self.operators = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators += 1
        if operator._schema.name in ("aten::mm", "aten::addmm"):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            self.multiplications += left.numel() * right.shape[-1]
        return operator(*args, **(kwargs or {}))


def work(depth: int) -> tuple[float, float]:
    """Multiplications of a whole calibration, in plain forwards, and operators for each block."""
    network = randomized(Chain(depth))
    with Products() as once, torch.no_grad():
        for batch in data():
            network(batch)
    with Products() as counted:
        walk = rerun(network, data())
        for name in walk.order:
            walk.inputs(name)
    return counted.multiplications / once.multiplications, counted.operators / depth


def test_work_is_linear_in_depth() -> None:
    (_, a), (_, b), (forwards, c) = work(8), work(16), work(32)
    assert max(a, b, c) < 1.15 * min(a, b, c)
    assert forwards < 4


def test_layers_with_one_input_are_seen_together() -> None:
    walk = rerun(randomized(Chain(1)), data())
    assert walk.order == [f"blocks.0.{name}" for name in ("a", "b", "c", "out")] + ["head"]
    assert walk.together("blocks.0.a") == ["blocks.0.a", "blocks.0.b", "blocks.0.c"]
    one, other = walk.inputs("blocks.0.a"), walk.inputs("blocks.0.c")
    assert all(x is y for (x, _), (y, _) in zip(one, other, strict=True))
    assert walk.together("blocks.0.out") == ["blocks.0.out"]


def test_no_more_is_kept_than_a_block_needs() -> None:
    """What is held after the last block of a deep network is what was held after the first ones."""
    walk = rerun(randomized(Chain(8)), data())
    held = []
    for name in walk.order:
        walk.inputs(name)
        content = walk.batches.store.open(0)
        tensors = {id(t): t for t in torch.utils._pytree.tree_leaves(content) if isinstance(t, Tensor)}
        held.append(sum(t.numel() for t in tensors.values()))
    in_first_blocks = max(held[:8])
    assert max(held) <= in_first_blocks


def test_the_answer_runs_from_the_kept_values_on() -> None:
    network = randomized(Chain(4))
    walk = rerun(network, data(), finishes=True)
    walk.inputs("blocks.3.a")
    with Products() as counted:
        answer = walk.finish(1)
    assert torch.allclose(answer, network(data()[1]), atol=1e-6)
    with Products() as once:
        network(data()[1])
    assert counted.multiplications < 0.4 * once.multiplications


def test_layers_with_one_input_share_its_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of three projections' input are gathered once, whichever of them is fitted first."""
    gathered = []

    def counting(inputs: Any, *arguments: Any) -> Any:
        gathered.append(inputs.name)
        return paired_pieces(inputs, *arguments)

    monkeypatch.setattr(full_gram, "paired_pieces", counting)
    network = randomized(Chain(2))
    config = bgd.BGDConfig(overrides=(("head", bgd.LayerConfig(block_size=4)),), max_divergence=None)
    whole = bgd.quantize(network, data(), config, progress=False).model
    assert gathered == [f"blocks.{n}.{name}" for n in (0, 1) for name in ("b" if n == 0 else "a", "out")] + ["head"]
    a = bgd.BGDConfig(overrides=(("blocks.1.a", None), *config.overrides), max_divergence=None)
    parts = bgd.quantize(network, data(), a, progress=False).model
    assert torch.equal(whole.get_submodule("blocks.0.c").codes, parts.get_submodule("blocks.0.c").codes)


def test_a_bound_on_memory_changes_no_result() -> None:
    network = randomized(Chain(2))
    free, bound = (
        bgd.quantize(network, data(), bgd.BGDConfig(max_divergence=None), memory_bytes=bytes_, progress=False)
        for bytes_ in (None, 6000)
    )
    one, other = free.model.state_dict(), bound.model.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert any("in a file" in note for note in bound.report.notes)


def _drifting() -> tuple[Model, Model]:
    torch.manual_seed(0)
    reference = Model(tied=False).eval()
    student = copy_module(reference, share_tensors=True)
    changed = nn.Linear(WIDTH, WIDTH, bias=False)  # as if it were quantized
    student.blocks[0].v = changed
    return student, reference


@torch.no_grad()
def test_the_drift_of_a_skip_connection() -> None:
    student, reference = _drifting()
    data = [words() for _ in range(2)]
    batches = collect_batches(data, reference, device=torch.device("cpu"), forward=None)
    weights = {path: m.weight for path, m in reference.named_modules() if isinstance(m, nn.Linear)}
    rerun = Rerun(student, reference, batches, weights, [])
    streams: dict[str, list[Tensor]] = {}
    for name, network in (("student", student), ("reference", reference)):
        norm = network.blocks[0].norm2  # type: ignore[union-attr]
        hook = norm.register_forward_hook(lambda _m, args, _o, name=name: streams.setdefault(name, []).append(args[0]))
        for x in data:
            network(x)
        hook.remove()
    found = {}
    for name in rerun.order:
        rerun.inputs(name)
        found[name] = rerun.skip(name)
    assert [name for name, skip in found.items() if skip is not None] == [
        f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("o", "down")
    ]
    rerun = Rerun(
        student, reference, collect_batches(data, reference, device=torch.device("cpu"), forward=None), weights, []
    )
    for name in rerun.order[: rerun.order.index("blocks.0.down") + 1]:
        rerun.inputs(name)
        skip = rerun.skip(name)
        if name == "blocks.0.o":  # nothing has changed before it
            assert skip is not None and float(skip[0](0).abs().max()) == 0
        if name == "blocks.0.down":
            assert skip is not None
            drift, stream = skip
            for batch in (0, 1):
                torch.testing.assert_close(drift(batch), streams["reference"][batch] - streams["student"][batch])
                torch.testing.assert_close(stream(batch), streams["reference"][batch])


@pytest.mark.parametrize("in_place", [False, True])
def test_the_end_of_a_branch(in_place: bool) -> None:
    end = BranchEnd()
    x, weight, bias, skip = torch.randn(6, 4), torch.randn(4, 5), torch.randn(5), torch.randn(2, 3, 5)
    aten = torch.ops.aten
    end.layer("last")
    assert end.before(aten.mm.default, (x, weight)) is None
    blank = end.blank(aten.mm.default, (x, weight))
    assert blank is not None and blank.shape == (6, 5)
    end.after(blank)
    assert end.before(aten.add.Tensor, (blank, bias)) is None  # a bias, not a skip
    output = blank + bias
    end.after(output)
    operator = aten.add_.Tensor if in_place else aten.add.Tensor
    name, other = end.before(operator, (skip, output.view(2, 3, 5))) or ("", x)
    assert name == "last" and other is skip


def test_an_output_that_is_changed_ends_no_branch() -> None:
    end = BranchEnd()
    output, skip = torch.randn(6, 5), torch.randn(6, 5)
    end.layer("last")
    end.after(output)
    assert end.before(torch.ops.aten.relu_.default, (output,)) is None
    assert end.before(torch.ops.aten.add.Tensor, (output, skip)) is None


@torch.no_grad()
def test_a_run_says_how_often_layers_run_and_gives_both_networks_inputs() -> None:
    student, reference = _drifting()
    data = [words() for _ in range(2)]
    batches = collect_batches(data, reference, device=torch.device("cpu"), forward=None)
    weights = {path: m.weight for path, m in reference.named_modules() if isinstance(m, nn.Linear)}
    rerun = Rerun(student, reference, batches, weights, [])
    for name in rerun.order:
        assert rerun.times(name) == 2 and not rerun.runs_twice(name)
    name = "blocks.0.down"
    for earlier in rerun.order[: rerun.order.index(name)]:
        rerun.inputs(earlier)
        assert rerun.skip(name) is None  # whose inputs were not asked for
    paired, plain = list(rerun.inputs(name).pairs()), list(rerun.inputs(name, paired=False).pairs())
    assert len(paired) == len(plain) == 2
    assert all(bool((mine != theirs).any()) for mine, theirs, _ in paired)
    assert all(torch.equal(mine, theirs) for mine, theirs, _ in plain)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(paired, plain, strict=True))
