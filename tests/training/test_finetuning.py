"""Global finetuning: the student moves towards the teacher, with all that it trains and nothing else."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import FinetuningConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import CalibrationError, ConfigError
from bgd_plugin.support.steps import Steps
from bgd_plugin.training import Epochs, finetune_, kl_to_teacher
from bgd_plugin.training.finetuning import total_steps
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors


def _student(model: nn.Module, data: list[Tensor]) -> Any:
    return bgd.quantize(model, data, em(), progress=False).model.requires_grad_(False)


def _finetune(student: nn.Module, teacher: nn.Module, data: list[Tensor], config: FinetuningConfig) -> list[int]:
    steps: list[int] = []
    batches = [Batch((batch,)) for batch in data]
    finetune_(student, teacher, Epochs(lambda _: batches), len(batches), config, Steps(on_steps=steps.append))
    return steps


@torch.no_grad()
def _loss(student: nn.Module, teacher: nn.Module, data: list[Tensor]) -> float:
    return sum(float(kl_to_teacher(student(x), teacher(x))) for x in data)


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (FinetuningConfig(epochs=10, trained="codebooks", learning_rate=0.5), 0.8),
        (FinetuningConfig(epochs=10, learning_rate=0.01), 0.5),
    ],
    ids=["codebooks", "all"],
)
def test_the_loss_falls(config: FinetuningConfig, share: float) -> None:
    teacher, data = PlainNet().eval(), vectors(4)
    student = _student(teacher, data)
    before = _loss(student, teacher, data)
    _finetune(student, teacher, data, config)
    assert _loss(student, teacher, data) < share * before


def test_all_that_is_learnt_moves_and_neither_codes_nor_statistics() -> None:
    teacher, data = randomized(SmallResNet()), images()
    student = _student(teacher, data)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    learnt = {name for name, _ in student.named_parameters()}
    _finetune(student, teacher, data, FinetuningConfig(steps=3))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == learnt


@pytest.mark.parametrize(
    ("layers", "moves"),
    [
        (("fc",), ("fc.",)),
        (("conv2", "bn?"), ("conv2.", "bn1.", "bn2.", "bn3.")),
        (("*",), ("",)),
    ],
)
def test_only_the_layers_that_are_named_move(layers: tuple[str, ...], moves: tuple[str, ...]) -> None:
    teacher, data = randomized(SmallResNet()), images()
    student = _student(teacher, data)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    _finetune(student, teacher, data, FinetuningConfig(steps=3, layers=layers))
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if name.startswith(moves)}


def test_a_module_is_named_by_any_module_that_it_is_in() -> None:
    teacher = nn.Sequential(nn.Linear(12, 16), nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(16, 8)))).eval()
    data = vectors(4)
    student = _student(teacher, data)
    before = {name: value.detach().clone() for name, value in student.named_parameters()}
    _finetune(student, teacher, data, FinetuningConfig(steps=3, layers=("1",)))
    moved = {name for name, value in student.named_parameters() if not torch.equal(value, before[name])}
    assert moved and moved == {name for name in before if name.startswith("1.")}


def test_the_backward_pass_ends_at_the_first_layer_that_is_trained() -> None:
    teacher, data = PlainNet().eval(), vectors(1)
    student = _student(teacher, data)
    with_gradients: list[str] = []
    for name in ("0", "2", "4"):
        student.get_submodule(name).register_forward_hook(
            lambda _module, _args, out, name=name: with_gradients.append(name) if out.requires_grad else None
        )
    _finetune(student, teacher, data, FinetuningConfig(steps=1, layers=("2", "4")))
    assert with_gradients == ["2", "4"]


def test_a_glob_that_names_nothing_that_is_trained_is_an_error() -> None:
    teacher, data = PlainNet().eval(), vectors(1)
    with pytest.raises(ConfigError, match="finetuning: layers: no module named 'head' has a parameter"):
        _finetune(_student(teacher, data), teacher, data, FinetuningConfig(steps=1, layers=("2", "head")))
    with pytest.raises(ConfigError, match=r"layers=\('2',\) with trained='codebooks'"):
        FinetuningConfig(layers=("2",), trained="codebooks")
    with pytest.raises(ConfigError, match="recode_every=5 with layers"):
        FinetuningConfig(layers=("2",), recode_every=5)


def test_a_step_moves_each_tensor_by_its_share() -> None:
    teacher, data = PlainNet().eval(), vectors(1)
    student = _student(teacher, data)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    _finetune(student, teacher, data, FinetuningConfig(steps=1, learning_rate=0.01))
    for name, parameter in student.named_parameters():
        size = max(1e-3, float(before[name].square().mean().sqrt()))
        largest = float((parameter.detach() - before[name]).abs().max())
        assert largest == pytest.approx(0.01 * size, rel=2e-2, abs=1e-8), (
            name
        )  # Adam's first step has the rate's length


def test_codebooks_and_batch_norm_statistics_move_and_nothing_else() -> None:
    teacher, data = randomized(SmallResNet()), images()
    student = _student(teacher, data)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    _finetune(student, teacher, data, FinetuningConfig(steps=3, trained="codebooks"))
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    norms = {f"{n}.{b}" for n in ("bn1", "bn2", "bn3") for b in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {f"{layer}.codebook" for layer in ("conv1", "conv2", "down", "fc")} | norms


def test_the_first_step_is_that_of_sgd_on_the_mean_gradients() -> None:
    teacher, data = PlainNet().eval(), vectors(1)
    student = _student(teacher, data)
    layers = [student.get_submodule(name) for name in ("2", "4")]
    starts = [layer.codebook.detach().clone() for layer in layers]
    weights = [layer.weight.detach().clone().requires_grad_(True) for layer in layers]
    hidden = torch.relu(student.get_submodule("0")(data[0]))
    hidden = torch.relu(hidden @ weights[0].T + layers[0].bias)
    with torch.no_grad():
        target = teacher(data[0])
    kl_to_teacher(hidden @ weights[1].T + layers[1].bias, target).backward()
    config = FinetuningConfig(steps=1, trained="codebooks", learning_rate=0.5, weight_decay=0.0)
    _finetune(student, teacher, data, config)
    for layer, start, weight in zip(layers, starts, weights, strict=True):
        blocks = weight.grad.reshape(*layer.codes.shape, 4)
        for code in layer.codes.unique().tolist():
            expected = start[code] - 0.5 * blocks[layer.codes == code].mean(0)
            torch.testing.assert_close(layer.codebook[code].detach(), expected, rtol=1e-3, atol=1e-5)


def test_it_ends_in_evaluation_mode_even_if_it_fails() -> None:
    teacher, data = randomized(SmallResNet()), images()
    student = _student(teacher, data)
    with pytest.raises(CalibrationError):
        _finetune(student, nn.Sequential(nn.Flatten(), nn.Linear(192, 7)), data, FinetuningConfig(steps=3))
    assert not any(module.training for module in student.modules())


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (FinetuningConfig(), 9 * 4),
        (FinetuningConfig(epochs=2), 2 * 4),
        (FinetuningConfig(steps=6), 6),
        (FinetuningConfig(steps=1), 1),
    ],
)
def test_epochs_and_steps(config: FinetuningConfig, steps: int) -> None:
    teacher, data = PlainNet().eval(), vectors(4)
    assert len(_finetune(_student(teacher, data), teacher, data, config)) == steps == total_steps(config, 4)


def test_the_learning_rate_falls_to_a_tenth_after_each_third(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.SGD.step

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    teacher, data = PlainNet().eval(), vectors(1)
    config = FinetuningConfig(steps=6, trained="codebooks", learning_rate=0.1)
    _finetune(_student(teacher, data), teacher, data, config)
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_loss_that_is_not_finite_says_what_to_lower() -> None:
    teacher, data = PlainNet().eval(), vectors(2)
    student = _student(teacher, data)
    teacher[4].bias.data.fill_(float("nan"))
    with pytest.raises(CalibrationError, match=r"finetuning: the loss is nan; lower learning_rate=0\.001"):
        _finetune(student, teacher, data, FinetuningConfig(steps=2))


def test_data_that_is_empty_on_a_second_walk_says_so() -> None:
    teacher, data = PlainNet().eval(), vectors(1)
    walks = iter([[Batch((data[0],))], []])
    with pytest.raises(
        CalibrationError, match="the calibration data is empty on its second iteration: give a DataLoader"
    ):
        finetune_(_student(teacher, data), teacher, Epochs(lambda _: next(walks)), 1, FinetuningConfig(steps=2))


def test_the_report_gives_the_loss_at_first_and_at_last() -> None:
    config = em(finetuning=FinetuningConfig(steps=60))
    report = bgd.quantize(PlainNet(), vectors(), config, progress=False).report
    (note,) = [note for note in report.notes if note.startswith("finetuning: loss ")]
    first, last = (float(number) for number in re.findall(r"\d[\d.e-]*", note))
    assert 0 < last < first
