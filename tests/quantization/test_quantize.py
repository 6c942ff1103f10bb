"""The one transform: what it fits, in which order, on which inputs, and in how many runs."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig, LayerConfig
from bgd_plugin.nn import PQConv2d, PQLinear, PQModule
from bgd_plugin.pq.blocks import Geometry, to_blocks, unfold_inputs
from tests.networks import (
    PlainNet,
    SmallResNet,
    em,
    images,
    randomized,
    same_outputs,
    vectors,
)


def _quantize(
    model: nn.Module, data: Any, config: bgd.BGDConfig | None = None, **options: Any
) -> bgd.results.Quantized:
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
    assert isinstance(model, SmallResNet)
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
    blocks, codebook = (
        to_blocks(model.conv2.weight.detach().double(), 9).flatten(0, 1),
        layer.codebook.detach().double(),
    )
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
    data, calls = images(3), Counter[str]()

    def count(module: nn.Module, *_: Any) -> None:
        channels = getattr(module, "num_features", None)
        calls.update(
            [f"norm of {channels}"] if channels else ["stem"] if getattr(module, "in_channels", 0) == 3 else []
        )

    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        _quantize(randomized(SmallResNet()), data, em(batchnorm=batchnorm))
    finally:
        hook.remove()
    # Both networks answer once more at the end; network and graph do before the fit and after it, to be compared.
    # Before the fit one batch runs through the network, once as it is and once in the compressed network's classes.
    answers = (2 + 4) * len(data) + 2
    assert calls == {"stem": 3 + answers, "norm of 8": 3 + answers, "norm of 16": 2 * (3 * runs + answers)}


def test_a_float_layer_never_runs_on_the_students_side() -> None:
    model, data, calls = randomized(SmallResNet()), images(3), Counter[str]()
    for name in ("conv1", "conv2", "fc"):
        model.get_submodule(name).register_forward_hook(
            lambda module, *_, name=name: calls.update([name] if isinstance(module, (nn.Conv2d, nn.Linear)) else [])
        )
    _quantize(model, data)
    assert calls == {}


def test_the_calibration_data_is_walked_once_without_training() -> None:
    result = _quantize(randomized(SmallResNet()), iter(images()))
    assert len(result.report.layers) == 4


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
    "finetuning": FinetuningConfig(epochs=10, learning_rate=0.01),
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
