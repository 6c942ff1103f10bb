"""The one transform: what it fits, in which order, on which inputs, and in how many runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig, LayerConfig
from bgd_plugin.nn import PQConv2d, PQLinear, PQModule, PQWeight
from bgd_plugin.pq.blocks import Geometry, to_blocks, unfold_inputs
from tests.networks import (
    FunctionalNet,
    PlainNet,
    SmallResNet,
    TwiceNet,
    em,
    images,
    randomized,
    same_outputs,
    vectors,
)


def _quantize(model: nn.Module, data: Any, config: bgd.BGDConfig | None = None, **options: Any) -> bgd.Quantized:
    return bgd.quantize(model, data, config or em(), progress=False, **options)


@contextlib.contextmanager
def _inputs_of(model: nn.Module, name: str) -> Any:
    """Collects what goes into a module."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    yield seen
    hook.remove()


def _rows(model: nn.Module, name: str, data: list[Tensor], like: nn.Conv2d) -> Tensor:
    """The unfolded inputs of a convolution, `[positions, columns]`."""
    with _inputs_of(model, name) as seen, torch.no_grad():
        for batch in data:
            model(batch)
    geometry = Geometry.of(like.kernel_size, like.stride, like.padding, like.dilation, like.groups)
    return torch.cat([unfold_inputs(value, geometry)[0] for value in seen]).double()


# --- what comes out


def test_layers_stand_at_the_paths_of_the_float_layers() -> None:
    model = _quantize(randomized(SmallResNet()), images()).model
    assert isinstance(model, fx.GraphModule)
    assert isinstance(model.conv1, PQConv2d)
    assert isinstance(model.fc, PQLinear)
    assert type(model.stem) is nn.Conv2d


def test_what_is_not_quantized_keeps_its_bits() -> None:
    float_model = randomized(SmallResNet())
    state = _quantize(float_model, images()).model.state_dict()
    kept = {name: value for name, value in float_model.state_dict().items() if name in state}
    assert {"stem.weight", "bn1.weight", "bn3.running_var", "fc.bias"} <= set(kept)
    assert all(torch.equal(state[name], value) for name, value in kept.items())


def test_the_answers_stay_close_when_nearly_every_block_has_its_codeword() -> None:
    model = randomized(SmallResNet())
    fine = LayerConfig(block_size=1, codebook_size=128)
    config = em(conv=fine, pointwise_conv=fine, linear=fine)
    fitted = _quantize(model, images(), config).model
    with torch.no_grad():
        out, exact = (torch.cat([net(x) for x in images()]) for net in (fitted, model))
    assert float((out - exact).norm() / exact.norm()) < 0.1


def test_more_codewords_lose_less() -> None:
    model, errors = PlainNet(), []
    for k in (4, 16, 32):
        config = em(linear=LayerConfig(block_size=4, codebook_size=k))
        errors.append(_quantize(model, vectors(), config).report.layers[0].relative_error)
    assert errors[0] > errors[1] > errors[2] > 0


def test_codewords_are_the_means_of_their_blocks_in_half_precision() -> None:
    model = randomized(SmallResNet())
    layer: Any = _quantize(model, images()).model.conv2
    blocks = to_blocks(model.conv2.weight, 9)
    for code in layer.codes.unique().tolist():
        mean = blocks[layer.codes == code].mean(0)
        torch.testing.assert_close(layer.codebook[code], mean.half().float(), rtol=2e-3, atol=1e-6)
    assert torch.equal(layer.codebook, layer.codebook.half().float())


@pytest.mark.parametrize("name", ["conv1", "conv2", "down"])
def test_the_reported_error_is_that_on_the_inputs_of_the_quantized_lower_layers(name: str) -> None:
    """The lower layers of the result are what the layer saw: its error on their outputs is the reported one."""
    model, data = randomized(SmallResNet()), images()
    result = _quantize(model, data)
    layer, exact = result.model.get_submodule(name), model.get_submodule(name).weight.double()
    lost, exact = (exact - layer.weight.double()).detach().flatten(1), exact.detach().flatten(1)

    def error(network: nn.Module) -> float:
        rows = _rows(network, name, data, model.get_submodule(name))
        return float((rows @ lost.T).square().sum() / (rows @ exact.T).square().sum())

    reported = {x.name: x.relative_error for x in result.report.layers}[name]
    assert reported == pytest.approx(error(result.model), rel=1e-5)
    if name == "conv2":  # the only one of the three that comes after a quantized layer
        assert abs(error(model) - reported) > 1e-3 * reported


def test_codes_are_fitted_to_the_inputs_of_the_quantized_lower_layers() -> None:
    """Under the Gram of those inputs no block has a much nearer codeword than its own."""
    model, data = randomized(SmallResNet()), images()
    result = _quantize(model, data, em(em_iterations=100)).model
    rows = _rows(result, "conv2", data, model.conv2).reshape(-1, 9)
    layer: Any = result.conv2
    blocks, codebook = to_blocks(model.conv2.weight.detach().double(), 9).flatten(0, 1), layer.codebook.detach().double()
    difference = blocks[:, None] - codebook
    distances = torch.einsum("nkd,de,nke->nk", difference, rows.T @ rows, difference)
    own = distances.gather(1, layer.codes.long().reshape(-1, 1)).squeeze(1)
    assert float((own - distances.min(1).values).max()) < 0.02 * float(own.mean())


def test_a_dead_input_channel_does_no_harm() -> None:
    model = randomized(SmallResNet())
    model.bn1.weight.data[2], model.bn1.bias.data[2] = 0.0, -1.0
    result = _quantize(model, images(), em(batchnorm="matched"))
    assert all(bool(torch.isfinite(result.model(x)).all()) for x in images())


def test_inputs_of_zero_give_a_network_with_a_reported_error_of_zero() -> None:
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 16, bias=False))
    result = _quantize(model, [torch.zeros(4, 12)], em(batchnorm="matched"))
    assert result.report.layers[0].relative_error == 0
    assert bool(torch.isfinite(result.model(torch.randn(4, 12))).all())


def test_fewer_distinct_blocks_than_codewords_are_kept_exactly() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 32, bias=False))
    model[1].weight.data = torch.randn(3, 4).repeat(43, 1)[:128].reshape(32, 16)
    result = _quantize(model, vectors())
    assert result.report.layers[0].codebook_size == 16
    torch.testing.assert_close(result.model.get_submodule("1").weight, model[1].weight, rtol=1e-3, atol=1e-4)


# --- one pass


@pytest.mark.parametrize(("batchnorm", "runs"), [("keep", 1), ("matched", 2), ("reestimate", 1)])
def test_every_module_runs_once_per_batch_and_network(batchnorm: Any, runs: int) -> None:
    """However many layers there are: in the student, and for the correction also in the float network."""
    model, data, calls = randomized(SmallResNet()), images(3), Counter[str]()
    for name in ("stem", "bn1", "bn2", "bn3"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    _quantize(model, data, em(batchnorm=batchnorm))
    assert calls == {"stem": 3, "bn1": 3, "bn2": 3 * runs, "bn3": 3 * runs}


def test_a_float_layer_never_runs_on_the_students_side() -> None:
    model, data, calls = randomized(SmallResNet()), images(3), Counter[str]()
    for name in ("conv1", "conv2", "fc"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.update([name]))
    _quantize(model, data)
    assert calls == {}


def test_the_calibration_data_is_walked_once_without_training() -> None:
    result = _quantize(randomized(SmallResNet()), iter(images()))
    assert len(result.report.layers) == 4


# --- forms of networks


def test_a_module_that_runs_twice_stays_one() -> None:
    result = _quantize(TwiceNet(), vectors())
    assert [layer.name for layer in result.report.layers] == ["shared", "last"]
    calls = [node for node in result.model.graph.nodes if node.op == "call_module" and node.target == "shared"]
    assert len(calls) == 2
    assert isinstance(result.model.shared, PQLinear)


def _two_names() -> fx.GraphModule:
    """A graph that calls one module by two names."""
    traced = fx.symbolic_trace(TwiceNet())
    traced.add_submodule("alias", traced.shared)
    second = [node for node in traced.graph.nodes if node.target == "shared"][1]
    second.target = "alias"
    traced.recompile()
    return traced


def test_a_module_with_two_names_stays_one_under_both(tmp_path: Path) -> None:
    model = _quantize(_two_names(), vectors()).model
    assert isinstance(model.shared, PQLinear)
    assert model.shared is model.alias
    bgd.save(model, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=_two_names())
    assert loaded.shared is loaded.alias
    assert same_outputs(model, loaded, vectors())
    dense = bgd.materialize(model)
    assert type(dense.shared) is nn.Linear
    assert dense.shared is dense.alias


def test_a_module_that_runs_twice_is_fitted_to_both_its_inputs() -> None:
    model = TwiceNet()
    result = _quantize(model, vectors(), em(overrides=(("last", None),)))
    with torch.no_grad():
        weight, bias = model.shared.weight.double(), model.shared.bias.double()
        lost = weight - result.model.shared.weight.double()
        first = torch.cat([torch.tanh(model.first(batch)) for batch in vectors()]).double()
        rows = torch.cat([first, torch.tanh(first @ weight.T + bias)])
        expected = float((rows @ lost.T).square().sum() / (rows @ weight.T).square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-5)


def test_functional_weights_become_modules_that_return_them() -> None:
    model = FunctionalNet()
    result = _quantize(model, images(size=12))
    assert [layer.name for layer in result.report.layers] == ["own", "kernel", "matrix"]
    assert all(isinstance(result.model.get_submodule(p), PQWeight) for p in ("own.weight", "kernel", "matrix"))


def test_functional_layers_compute_with_the_decoded_weight() -> None:
    model, data = FunctionalNet(), images(size=12)
    result = _quantize(model, data).model
    for path in ("own.weight", "kernel", "matrix"):
        model.get_parameter(path).data = result.get_submodule(path).weight.detach().clone()
    assert same_outputs(model, result, data)


def test_a_traced_network_goes_in() -> None:
    model = randomized(SmallResNet())
    traced = fx.symbolic_trace(model)
    one, other = _quantize(model, images()).model, _quantize(traced, images()).model
    assert same_outputs(one, other, images())


def test_a_network_traced_with_an_input_that_has_a_default_goes_in() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = PlainNet()

        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.net(x * scale)

    model = Scaled()
    result = _quantize(model, vectors()).model
    assert torch.equal(result(vectors()[0]), result(vectors()[0], 2.0))
    assert not torch.equal(result(vectors()[0]), result(vectors()[0], 1.0))


def test_a_second_pass_quantizes_what_the_first_left_and_keeps_what_it_did() -> None:
    first = _quantize(randomized(SmallResNet()), images(), em(overrides=(("fc", None),))).model
    second = _quantize(first, images())
    assert [layer.name for layer in second.report.layers] == ["fc"]
    assert {s.name: s.reason for s in second.report.skipped}["conv1"] == "already quantized"
    assert torch.equal(second.model.conv1.codes, first.conv1.codes)


def test_a_second_pass_takes_no_later_layer_for_the_first() -> None:
    config = em(overrides=(("0", LayerConfig(block_size=4)), ("4", None)))
    first = _quantize(PlainNet(), vectors(), config).model
    assert [layer.name for layer in _quantize(first, vectors()).report.layers] == ["4"]


def test_a_second_pass_over_functional_layers_keeps_them() -> None:
    first = _quantize(FunctionalNet(), images(size=12), em(overrides=(("matrix", None),))).model
    second = _quantize(first, images(size=12))
    assert [layer.name for layer in second.report.layers] == ["matrix"]
    assert torch.equal(second.model.kernel.codes, first.kernel.codes)


def test_a_second_pass_with_nothing_left_says_so() -> None:
    first = _quantize(randomized(SmallResNet()), images(), em(first_layer=LayerConfig(block_size=9))).model
    with pytest.raises(bgd.ConfigError, match="no layer of the network can be quantized: .*: already quantized"):
        _quantize(first, images())


def test_the_only_layer_may_be_the_first_one() -> None:
    result = _quantize(nn.Sequential(nn.Linear(12, 16)), vectors(), em(first_layer=LayerConfig(block_size=4)))
    assert result.report.layers[0].name == "0"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_follow_the_model(dtype: torch.dtype) -> None:
    data = [batch.to(dtype) for batch in images()]
    model = randomized(SmallResNet()).to(dtype)
    result = _quantize(model, data, em(batchnorm="matched"))
    floats = {p.dtype for p in result.model.parameters()} | {result.model.bn2.running_mean.dtype}
    assert floats == {dtype}
    assert result.model(data[0]).dtype == dtype
    assert bool(torch.isfinite(result.model(data[0])).all())


# --- forms of calibration data


class TwoInputs(nn.Module):
    """Takes two inputs and has no batch of the plain forms."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.a(left) + self.b(right)))


@pytest.mark.parametrize("wrap", [lambda x: (x, torch.zeros(8)), lambda x: [x, "label"], lambda x: {"input": x}])
def test_batches_may_carry_labels_or_be_keywords(wrap: Callable[[Tensor], Any]) -> None:
    model = PlainNet()
    expected = _quantize(model, vectors()).model
    assert same_outputs(expected, _quantize(model, [wrap(x) for x in vectors()]).model, vectors())


def test_a_mapping_gives_several_inputs() -> None:
    data = [{"right": x, "left": 2 * x} for x in vectors()]
    result = _quantize(TwoInputs(), data)
    assert [layer.name for layer in result.report.layers] == ["b", "head"]


def test_forward_calls_the_network_as_it_likes() -> None:
    model = TwoInputs()
    expected = _quantize(model, [{"left": x, "right": -x} for x in vectors()]).model
    found = _quantize(model, vectors(), forward=lambda net, x: net(x, right=-x)).model
    assert torch.equal(expected(vectors()[0], vectors()[1]), found(vectors()[0], vectors()[1]))


def test_forward_may_look_at_the_networks_attributes() -> None:
    model = TwoInputs()
    model.scale = 3.0
    found = _quantize(model, vectors(), forward=lambda net, x: net(net.scale * x, x)).model
    expected = _quantize(model, [{"left": 3.0 * x, "right": x} for x in vectors()]).model
    assert torch.equal(expected(vectors()[0], vectors()[1]), found(vectors()[0], vectors()[1]))


def test_a_data_loader_goes_in() -> None:
    dataset = torch.utils.data.TensorDataset(torch.cat(vectors()), torch.zeros(24))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8)
    model = PlainNet()
    assert same_outputs(_quantize(model, vectors()).model, _quantize(model, loader).model, vectors())


# --- the teacher


TRAINING: dict[str, Any] = {
    "distillation": DistillationConfig(steps=3, batch_size=8, learning_rate=0.01),
    "finetuning": FinetuningConfig(steps=3),
}


@pytest.mark.parametrize("step", TRAINING)
def test_another_teacher_leads_elsewhere(step: str) -> None:
    model, config = PlainNet(), em(**{step: TRAINING[step]})
    other = nn.Sequential(nn.Linear(12, 5))
    by_itself, by_other = _quantize(model, vectors(), config), _quantize(model, vectors(), config, teacher=other)
    assert not same_outputs(by_itself.model, by_other.model, vectors())


def test_the_float_network_is_the_default_teacher() -> None:
    model, config = PlainNet(), em(**TRAINING)
    assert same_outputs(
        _quantize(model, vectors(), config).model, _quantize(model, vectors(), config, teacher=model).model, vectors()
    )


@torch.no_grad()
def _loss(student: nn.Module, teacher: nn.Module, data: list[Tensor]) -> float:
    """KL(teacher ‖ student), summed over batches."""
    pairs = [(student(x).log_softmax(1), teacher(x).log_softmax(1)) for x in data]
    return sum(float(F.kl_div(q, p, reduction="batchmean", log_target=True)) for q, p in pairs)


TRAINED: dict[str, Any] = {
    "distillation": DistillationConfig(steps=20, batch_size=16, learning_rate=0.5),
    "finetuning": FinetuningConfig(epochs=10, learning_rate=0.5),
}


@pytest.mark.parametrize("step", TRAINED)
def test_training_brings_the_answers_nearer_to_the_teachers(step: str) -> None:
    model, data = PlainNet(), vectors(4)
    plain, trained = (_loss(_quantize(model, data, c).model, model, data) for c in (em(), em(**{step: TRAINED[step]})))
    assert trained < 0.8 * plain


def test_distillation_works_behind_batch_norms_and_in_place_operators() -> None:
    model, data = randomized(SmallResNet()), images(4, batch=8)
    config = em(distillation=DistillationConfig(steps=20, batch_size=16, learning_rate=0.02))
    plain, trained = (_loss(_quantize(model, data, c).model, model, data) for c in (em(), config))
    assert trained < 0.8 * plain


@pytest.mark.parametrize("step", TRAINING)
def test_trained_codebooks_are_in_half_precision(step: str) -> None:
    model = _quantize(randomized(SmallResNet()), images(), em(**{step: TRAINING[step]})).model
    layers = [module for module in model.modules() if isinstance(module, PQModule)]
    assert len(layers) == 4
    assert all(torch.equal(layer.codebook, layer.codebook.half().float()) for layer in layers)


# --- modes, flags, progress


def test_training_modes_and_gradient_flags_are_those_of_the_users_network() -> None:
    model = randomized(SmallResNet()).train()
    model.bn2.eval()
    model.conv1.weight.requires_grad_(False)
    model.bn1.bias.requires_grad_(False)
    result = _quantize(model, images(), em(batchnorm="matched")).model
    assert {name: m.training for name, m in result.named_modules() if name in ("", "bn1", "bn2", "conv1", "fc")} == {
        "": True,
        "bn1": True,
        "bn2": False,
        "conv1": True,
        "fc": True,
    }
    flags = {name: p.requires_grad for name, p in result.named_parameters()}
    assert (flags["conv1.codebook"], flags["conv2.codebook"], flags["bn1.bias"], flags["bn1.weight"]) == (
        False,
        True,
        False,
        True,
    )


def test_a_network_in_training_mode_gives_what_one_in_evaluation_mode_gives() -> None:
    model = randomized(SmallResNet())
    expected = _quantize(model, images()).model
    found = _quantize(model.train(), images()).model
    assert same_outputs(expected, found.eval(), images())


def test_progress_goes_to_standard_error_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    bgd.quantize(PlainNet(), vectors(), em(), progress=False)
    assert capsys.readouterr() == ("", "")
    bgd.quantize(PlainNet(), vectors(), em(), progress=True)
    out, err = capsys.readouterr()
    assert (out, "2/2" in err) == ("", True)
