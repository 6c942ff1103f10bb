"""Codes chosen again while finetuning: the step literally, its limits, what is shared, and that it can be resumed."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import FinetuningConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.encoding.stream import coded_bytes
from bgd_plugin.encoding.tables import trellis_offset
from bgd_plugin.errors import ConfigError
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.pq.trellis import encode_trellis
from bgd_plugin.support.steps import Steps
from bgd_plugin.training import Epochs, finetune_, kl_to_teacher
from bgd_plugin.training.recoding import Recoding
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors

AGAIN = FinetuningConfig(steps=12, recode_every=4, recode_share=0.1, recode_trust=0.3, recode_rate=2.0)


def _student(model: nn.Module, data: list[Tensor], **fields: Any) -> Any:
    return bgd.quantize(model, data, em(**fields), progress=False).model.requires_grad_(False)


def _finetune(student: nn.Module, teacher: nn.Module, data: list[Tensor], config: Any, steps: Any = None) -> None:
    batches = [Batch((batch,)) for batch in data]
    finetune_(student, teacher, Epochs(lambda _: batches, can_skip=True), len(batches), config, steps)


def _codes(network: nn.Module) -> dict[str, Tensor]:
    return {name: module.codes.clone() for name, module in network.named_modules() if isinstance(module, PQModule)}


def test_codes_change_if_asked_for_and_only_then() -> None:
    teacher, data = randomized(SmallResNet()), images()
    for config, is_moved in ((AGAIN, True), (dataclasses.replace(AGAIN, recode_every=None), False)):
        student = _student(teacher, data)
        before = _codes(student)
        _finetune(student, teacher, data, config)
        moved = {name for name, codes in _codes(student).items() if not torch.equal(codes, before[name])}
        assert bool(moved) == is_moved
        assert all(module.watched_form is None for module in student.modules() if isinstance(module, PQModule))


def test_it_is_never_made_where_codes_stay_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("bgd_plugin.training.finetuning.Recoding", made)
    teacher, data = PlainNet().eval(), vectors(2)
    for config in (FinetuningConfig(steps=2), bgd.BGDConfig.paper().finetuning):
        assert config is not None and config.recode_every is None
        _finetune(_student(teacher, data), teacher, data, dataclasses.replace(config, epochs=None, steps=2))


def _literal_codes(layer: PQModule, gradients: list[Tensor], config: FinetuningConfig) -> Tensor:
    """The step in words: Adam's averages, a step of the weight, the nearest codewords, the best of them."""
    mean, square = torch.zeros_like(gradients[0]), torch.zeros_like(gradients[0])
    for gradient in gradients:
        mean, square = 0.9 * mean + 0.1 * gradient, 0.99 * square + 0.01 * gradient**2
    count, weight = len(gradients), layer.weight.detach()
    mean, root = mean / (1 - 0.9**count), (square / (1 - 0.99**count)).sqrt()
    metric = root / root.mean() + 0.1
    kept = torch.ones_like(weight) if layer.mask is None else layer.mask.view(weight.shape).float()
    size = weight.square().mean().sqrt()
    target = weight - config.recode_rate * size * (mean / root.mean()) / metric
    width, codes = layer.block_size, layer.codes.long().clone()
    found = []
    for row in range(codes.shape[0]):
        for block in range(codes.shape[1]):
            part = slice(width * block, width * (block + 1))
            own = metric[row, part] * kept[row, part]
            costs = [float((own * (word - target[row, part]) ** 2).sum()) for word in layer.codebook]
            best, old = min(range(len(costs)), key=costs.__getitem__), int(codes[row, block])
            energy = float((kept[row, part] * (layer.codebook[best] - layer.codebook[old]).square()).sum())
            if best != old:
                found.append(((costs[old] - costs[best]) / energy, energy, row, block, best))
    energy_left, codes_left = float((config.recode_trust * weight.norm()) ** 2), config.recode_share * codes.numel()
    for _, energy, row, block, best in sorted(found, reverse=True):
        if energy > (config.recode_trust * weight.norm()) ** 2:
            continue
        energy_left, codes_left = energy_left - energy, codes_left - 1
        if energy_left < 0 or codes_left < 0:
            break
        codes[row, block] = best
    return codes


@pytest.mark.parametrize("is_pruned", [False, True])
@pytest.mark.parametrize("fields", [{}, {"recode_trust": 0.03}, {"recode_share": 1.0, "recode_trust": 1.0}])
@torch.no_grad()
def test_the_step_is_the_literal_one(fields: dict[str, Any], is_pruned: bool) -> None:
    model = PlainNet().eval()
    if is_pruned:
        for layer in (model[2], model[4]):
            layer.weight *= (torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.4).float()
    student = _student(model, vectors(3), preserve_zeros=is_pruned)
    config = dataclasses.replace(AGAIN, recode_every=3, **fields)
    recoding = Recoding(student, config)
    layers = [module for module in student.modules() if isinstance(module, PQModule)]
    gradients: dict[Any, list[Tensor]] = {layer: [] for layer in layers}
    generator = torch.Generator().manual_seed(2)
    before = _codes(student)
    with recoding.watching():
        for step in range(3):
            for layer in layers:
                gradient = torch.randn(layer.weight_shape, generator=generator)
                gradients[layer].append(gradient if layer.mask is None else gradient * layer.mask)
                with torch.enable_grad():
                    layer.codebook.requires_grad_(True)
                    layer.weight.backward(gradient)
            if step == 2:
                expected = [_literal_codes(layer, gradients[layer], config) for layer in layers]
            recoding.step(1.0, lambda: 0.0)
    for layer, codes in zip(layers, expected, strict=True):
        assert torch.equal(layer.codes.long(), codes)
    assert any(not torch.equal(before[name], codes) for name, codes in _codes(student).items())


def _watched_steps(student: nn.Module, config: FinetuningConfig, loss: Any, share: float = 1.0) -> Recoding:
    recoding = Recoding(student, config)
    generator = torch.Generator().manual_seed(2)
    with recoding.watching():
        for _ in range(4):
            for module in student.modules():
                if isinstance(module, PQModule):
                    module.codebook.requires_grad_(True)
                    module.matrix.backward(torch.randn(module.matrix_shape, generator=generator))
            recoding.step(share, loss)
    return recoding


def test_a_change_that_raises_the_loss_is_undone_and_the_next_one_is_smaller() -> None:
    student = _student(PlainNet().eval(), vectors(3))
    before, losses = _codes(student), iter([1.0, 1.1])
    recoding = _watched_steps(student, AGAIN, lambda: next(losses))
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(student).items())
    assert (recoding.trust, recoding.undone, recoding.changed) == (AGAIN.recode_trust / 2, 1, 0)
    losses = iter([1.0, math.nan])
    _watched_steps(student, AGAIN, lambda: next(losses))
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(student).items())


@pytest.mark.parametrize("trust", [0.06, 0.2])
def test_the_weight_changes_by_no_more_than_is_trusted(trust: float) -> None:
    student = _student(PlainNet().eval(), vectors(3))
    layers = [module for module in student.modules() if isinstance(module, PQModule)]
    before = [layer.weight.detach().clone() for layer in layers]
    config = dataclasses.replace(AGAIN, recode_trust=trust, recode_share=1.0)
    _watched_steps(student, config, lambda: 0.0)
    changes = [float((x.weight.detach() - w).norm() / w.norm()) for x, w in zip(layers, before, strict=True)]
    assert 0.5 * trust < max(changes) <= trust * (1 + 1e-5)


def test_nothing_changes_at_the_end_of_the_schedule() -> None:
    student = _student(PlainNet().eval(), vectors(3))
    before = _codes(student)
    _watched_steps(student, AGAIN, lambda: 0.0, share=0.0)
    assert all(torch.equal(codes, before[name]) for name, codes in _codes(student).items())


def test_pruned_weights_stay_zero() -> None:
    model, data = randomized(SmallResNet()), images()
    with torch.no_grad():
        for layer in (model.conv1, model.conv2):
            layer.weight *= (torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    student = _student(model, data, preserve_zeros=True)
    before = _codes(student)
    _finetune(student, model, data, AGAIN)
    assert any(not torch.equal(codes, before[name]) for name, codes in _codes(student).items())
    for name in ("conv1", "conv2"):
        assert bool((student.get_submodule(name).weight[model.get_submodule(name).weight == 0] == 0).all())


class Tied(nn.Module):
    """An embedding whose table is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(40, 16), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.head(torch.relu(self.inner(self.table(tokens))))
        return result


def test_tied_layers_keep_one_tensor_of_codes_and_ask_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied().eval()
    data = [torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    config = em(embedding=bgd.LayerConfig(block_size=4, codebook_size=16))
    student = bgd.quantize(model, data, config, progress=False).model
    table, head = student.table, student.head
    assert isinstance(table, PQModule) and table.codes is head.codes
    before = table.codes.clone()
    recoding = Recoding(student, AGAIN)
    (layer,) = (layer for layer in recoding._layers if len(layer.modules) == 2)
    with recoding.watching():
        kl_to_teacher(student(data[0]), model(data[0])).backward()
    whole = bgd.materialize(student).train()
    whole.zero_grad()
    kl_to_teacher(whole(data[0]), model(data[0])).backward()
    torch.testing.assert_close(layer._gradient, whole.head.weight.grad, rtol=1e-4, atol=1e-6)
    _finetune(student, model, data, AGAIN)
    assert table.codes is head.codes and not torch.equal(table.codes, before)
    bgd.save(student, tmp_path / "net")
    assert torch.equal(bgd.load(tmp_path / "net", like=Tied()).table.codes, table.codes)


class _Rows(nn.Module):
    """One layer of single weights, whose codes are a walk through the trellis."""

    def __init__(self) -> None:
        super().__init__()
        levels = torch.linspace(-2, 2, 24)
        weight = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
        bits = 0.05 * levels.abs()
        codes = encode_trellis(weight.unsqueeze(1), levels, 2, bits, torch.ones(60, 80), None).squeeze(1)
        self.layer = quantized(nn.Linear(80, 60), levels[:, None], codes, None)


def test_entropy_coded_codes_stay_a_walk_and_take_no_more_bytes() -> None:
    network = _Rows()
    before = network.layer.codes.clone()
    most = coded_bytes(before, 24)
    recoding = _watched_steps(network, dataclasses.replace(AGAIN, recode_every=2, recode_share=0.3), lambda: 0.0)
    codes = network.layer.codes
    assert recoding.changed and not torch.equal(codes, before)
    assert trellis_offset(codes.numpy(), 24) is not None
    assert coded_bytes(codes, 24) <= most


def test_a_stopped_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    teacher, data = randomized(SmallResNet()), images()
    whole, parted = _student(teacher, data), _student(teacher, data)
    _finetune(whole, teacher, data, AGAIN)
    file = tmp_path / "steps.safetensors"

    def stopping(count: int) -> None:
        done.append(count)
        if sum(done) == 6:
            steps._save(6, parts)
            raise KeyboardInterrupt

    done: list[int] = []
    steps = Steps(file, stopping)
    parts: dict[str, Any] = {}
    run = steps.run
    steps.run = lambda total, **given: (parts.update(given), run(total, **given))[1]  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        _finetune(parted, teacher, data, AGAIN, steps)
    again = _student(teacher, data)
    _finetune(again, teacher, data, AGAIN, Steps(file))
    for (name, value), (_, other) in zip(whole.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(value, other), name


def test_through_quantize_the_file_stays_within_its_budget() -> None:
    model, data = randomized(SmallResNet()), images(6)
    config = bgd.BGDConfig(target_ratio=4.0, codes="entropy", finetuning=dataclasses.replace(AGAIN, steps=8), rounds=1)
    report = bgd.quantize(model, data, config, progress=False).report
    assert report.compressed_bytes <= report.original_bytes / 4
    assert any(note.startswith("finetuning: ") and "codes changed" in note for note in report.notes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recode_every": 0}, "recode_every=0: give at least 1"),
        ({"recode_share": 0.0}, "recode_share=0.0: give a share above 0"),
        ({"recode_trust": 1.5}, "recode_trust=1.5: give a share above 0, at most 1"),
        ({"recode_rate": 0.0}, "recode_rate=0.0: give a positive number"),
        ({"recode_every": 5, "trained": "codebooks"}, "codes are chosen again with 'all' alone"),
    ],
)
def test_settings_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FinetuningConfig(**fields)
