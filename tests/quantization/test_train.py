"""Who teaches, and what training is told of the data."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, DistillationConfig, FinetuningConfig, ReconstructionConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.planning.answers import compare_answers
from bgd_plugin.quantization import one_pass
from bgd_plugin.quantization import train as train_module
from bgd_plugin.quantization.train import check_teacher, teacher_for, train
from bgd_plugin.support.log import Log
from bgd_plugin.training.finetuning import Finetuned
from tests.networks import PlainNet, SmallResNet, em, images, randomized

CPU = torch.device("cpu")
PLAIN = BGDConfig(max_divergence=None)
TAUGHT = [
    dataclasses.replace(PLAIN, distillation=DistillationConfig(steps=1)),
    dataclasses.replace(PLAIN, finetuning=FinetuningConfig(steps=1)),
]


@pytest.mark.parametrize("config", TAUGHT)
def test_a_teacher_is_a_copy_in_evaluation_mode(config: BGDConfig) -> None:
    model = PlainNet().train()
    teacher = teacher_for(model, config, CPU)
    assert teacher is not None and teacher is not model
    assert not any(module.training for module in teacher.modules()) and all(m.training for m in model.modules())
    assert teacher.get_submodule("0").weight is model[0].weight  # on the same device nothing is copied


@pytest.mark.parametrize("config", [PLAIN, dataclasses.replace(PLAIN, reconstruction=ReconstructionConfig(steps=1))])
def test_nobody_teaches_where_nothing_follows_logits(config: BGDConfig) -> None:
    assert teacher_for(PlainNet(), config, CPU) is None


def test_a_teacher_on_another_device_moves_and_the_users_stays() -> None:
    model = PlainNet()
    teacher = teacher_for(model, TAUGHT[0], torch.device("meta"))
    assert teacher is not None and teacher.get_submodule("0").weight.is_meta and not model[0].weight.is_meta
    assert teacher_for(nn.Identity(), TAUGHT[0], torch.device("meta")) is not None


def _job(**fields: Any) -> Any:
    model = PlainNet().eval()
    parts = {
        "student": model,
        "reference": model,
        "teacher": model,
        "config": TAUGHT[0],
        "batches": [Batch((torch.ones(2, 12),))],
        "log": Log(),
        "survey": SimpleNamespace(config=PLAIN, network=model),
        "bar": SimpleNamespace(set_description=lambda _: None, update=lambda _: None, total=None),
    }
    return SimpleNamespace(**(parts | fields))


def test_only_a_teacher_that_is_given_is_checked() -> None:
    other = nn.Sequential(nn.Linear(12, 7)).eval()
    check_teacher(_job(teacher=other), is_given=False)
    with pytest.raises(Exception, match="7"):
        check_teacher(_job(teacher=other), is_given=True)
    job = _job(teacher=None)
    check_teacher(job, is_given=True)
    assert job.log.notes == ["the teacher was not used: distillation and finetuning are off"]
    check_teacher(_job(), is_given=True)


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_process_reconstructs_for_all(is_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(train_module, "is_first", lambda: is_first)
    monkeypatch.setattr(train_module, "_reconstruct", lambda job: done.append("reconstruct"))
    monkeypatch.setattr(train_module, "synchronize_", lambda student: done.append("synchronize"))
    monkeypatch.setattr(train_module, "_finetune", lambda *_: done.append("finetune"))
    config = dataclasses.replace(TAUGHT[1], reconstruction=ReconstructionConfig(steps=1))
    train(_job(config=config), [], None)
    assert done == (["reconstruct"] if is_first else []) + ["synchronize", "finetune"]
    done.clear()
    train(_job(config=PLAIN), [], None)
    assert done == []


def test_what_reconstruction_takes_back_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for taken_back, said in ((0, ""), (2, "; undone in 2 blocks without a gain")):
        gain = SimpleNamespace(blocks=3, before=0.5, after=0.25, taken_back=taken_back)
        monkeypatch.setattr(train_module, "_by_runs", lambda job, gain=gain: gain)
        job = _job()
        train_module._reconstruct(job)
        assert job.log.notes == [f"reconstruction: 3 blocks, mean loss on held-out samples 0.5 → 0.25{said}"]
        assert "reconstruct" in job.log.seconds


def test_steps_of_a_block_are_the_first_processes_alone() -> None:
    asked: list[Any] = []
    run = SimpleNamespace(steps=lambda name, on_steps, is_shared=True: asked.append((name, is_shared)))
    train_module._steps(_job(run=run), 7)
    assert asked == [("block-0007", False)]


@pytest.mark.parametrize("has_epochs", [True, False])
def test_finetuning_walks_the_data_from_epoch_one_on(has_epochs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler's number 0 was the walk that collected the calibration batches."""
    epochs: list[int] = []

    class Data(list[Any]):
        pass

    data = Data([torch.ones(2, 12)])
    if has_epochs:
        data.set_epoch = epochs.append  # type: ignore[attr-defined]
    given: dict[str, Any] = {}
    skips: list[bool] = []

    def finetuned(
        student: Any, teacher: Any, walks: Any, count: int, config: Any, steps: Any, *, fixed: Any
    ) -> Finetuned:
        skips.append(walks.can_skip)
        if len(skips) == 1:
            given.update(count=count, batches=[batch.size for batch in walks.epoch(2)])
        return Finetuned(first=2.0, last=1.0)

    monkeypatch.setattr(train_module, "finetune_", finetuned)
    monkeypatch.setattr(train_module, "Epochs", lambda epoch, can_skip: SimpleNamespace(epoch=epoch, can_skip=can_skip))
    job = _job(config=TAUGHT[1], run=SimpleNamespace(steps=lambda *_: None))
    job.batches = SimpleNamespace(given=5)
    train_module._finetune(job, data, None)
    assert given == {"count": 5, "batches": [2]}
    assert epochs == ([3] if has_epochs else [])
    assert skips == [True]
    for other, can_skip in (((1,), True), (SimpleNamespace(), False), (SimpleNamespace(set_epoch=epochs.append), True)):
        train_module._finetune(job, other, None)  # type: ignore[arg-type]
        assert skips[-1] == can_skip
    assert job.log.notes[0] == "finetuning: loss 2 → 1"


@pytest.mark.parametrize("trained", ["all", "codebooks"])
def test_finetuning_writes_to_nothing_that_others_share(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The float network judges the answers afterwards, and later passes start from it and from the fits."""
    moved: list[str] = []

    def watched(job: Any, *given: Any) -> None:
        def held() -> dict[str, Tensor]:
            fits = {f"fit {name}": fit.codebook for name, (_, fit) in job.run.fits.items()}
            return {**job.reference.state_dict(), **fits}

        before = {name: value.detach().clone() for name, value in held().items()}
        train(job, *given)
        moved.extend(name for name, value in held().items() if not torch.equal(value, before[name]))
        assert job.run.fits

    monkeypatch.setattr(one_pass, "train", watched)
    config = em(finetuning=FinetuningConfig(steps=2, trained=trained))
    bgd.quantize(randomized(SmallResNet()), images(), config, progress=False)
    assert moved == []


def test_answers_after_finetuning_are_compared_with_the_float_networks() -> None:
    model, data = randomized(SmallResNet()), images(5)
    config = em(finetuning=FinetuningConfig(steps=20, learning_rate=0.02))
    result = bgd.quantize(model, data, config, progress=False)
    batches = [Batch((x,)) for x in data]
    expected = compare_answers(
        lambda batch: batch.call(result.model), lambda batch: batch.call(model), batches, kept_aside=False
    )
    assert result.report.answers.divergence == pytest.approx(expected.divergence, rel=1e-4)
