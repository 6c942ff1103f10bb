"""A run that was stopped goes on where it was."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
import bgd_plugin.quantization.fingerprint
import bgd_plugin.support.steps
from bgd_plugin import DistillationConfig, FinetuningConfig
from bgd_plugin.errors import CheckpointError
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.quantization.resume import Run
from tests.networks import SmallResNet, em, images, randomized

TRAINED = em(
    batchnorm="matched",
    distillation=DistillationConfig(steps=2, batch_size=4, learning_rate=0.01),
    finetuning=FinetuningConfig(steps=2),
)


def _bytes(folder: Path | None, config: bgd.BGDConfig, model: nn.Module | None = None, data: Any = None) -> bytes:
    model = model or randomized(SmallResNet())
    data = images() if data is None else data
    return file_bytes(stored(bgd.quantize(model, data, config, checkpoint=folder, progress=False).model))


@pytest.fixture
def model() -> nn.Module:
    return randomized(SmallResNet())


def _stop_after(layers: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Make the run stop when it stores one layer more than `layers`; returns the list of stored layers."""
    done: list[int] = []
    store = Run.store

    def counted(self: Run, index: int, *args: Any) -> None:
        if len(done) == layers:
            raise KeyboardInterrupt
        done.append(index)
        store(self, index, *args)

    monkeypatch.setattr(Run, "store", counted)
    return done


@pytest.mark.parametrize("config", [em(), TRAINED], ids=["em", "trained"])
@pytest.mark.parametrize("finished", [1, 3])
def test_a_stopped_run_ends_in_the_same_bytes(
    model: nn.Module, config: bgd.BGDConfig, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _bytes(None, config, model)
    with monkeypatch.context() as patch:
        _stop_after(finished, patch)
        with pytest.raises(KeyboardInterrupt):
            _bytes(tmp_path / "run", config, model)
    rest = _stop_after(99, monkeypatch)
    assert _bytes(tmp_path / "run", config, model) == expected
    assert rest == list(range(finished, 4))  # nothing that was finished is done again


def test_a_stopped_run_with_a_budget_makes_the_same_choice(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = em(target_bytes=5000, float_storage="float16")
    expected = _bytes(None, config, model)
    with monkeypatch.context() as patch:
        _stop_after(1, patch)
        with pytest.raises(KeyboardInterrupt):
            _bytes(tmp_path / "run", config, model)
    rest = _stop_after(99, monkeypatch)
    assert _bytes(tmp_path / "run", config, model) == expected
    assert rest[0] == 1


def test_a_finished_run_can_be_read_again(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _bytes(tmp_path, em(), model)
    again = _stop_after(0, monkeypatch)
    assert _bytes(tmp_path, em(), model) == first
    assert again == []


def test_the_report_of_a_resumed_run_has_the_same_errors(model: nn.Module, tmp_path: Path) -> None:
    one, other = (bgd.quantize(model, images(), em(), checkpoint=tmp_path, progress=False).report for _ in range(2))
    assert one.layers == other.layers


def test_other_settings_are_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    expected = (
        r"contains a run with another config \(em_iterations was 8, is 9, seed was 0, is 1\): "
        "give the same, or an empty folder"
    )
    with pytest.raises(CheckpointError, match=expected):
        _bytes(tmp_path, em(seed=1, em_iterations=9), model)


def test_settings_within_settings_are_named(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(linear=bgd.LayerConfig(block_size=4)), model)
    with pytest.raises(CheckpointError, match=r"linear.codebook_size was 256, is 4\)"):
        _bytes(tmp_path, em(linear=bgd.LayerConfig(block_size=4, codebook_size=4)), model)


def test_another_network_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    model.get_parameter("fc.bias").data += 1
    with pytest.raises(
        CheckpointError, match=r"contains a run with another network \(fc.bias\), another teacher \(fc.bias\): give"
    ):
        _bytes(tmp_path, em(), model)


def test_a_network_with_other_layers_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    with pytest.raises(CheckpointError, match=r"another network \(stem.weight, bn1.weight, bn1.bias and \d+ more\)"):
        _bytes(tmp_path, em(), randomized(SmallResNet(classes=7), seed=4))


def test_other_calibration_data_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    data = images()
    data[1] = data[1] + 1
    with pytest.raises(CheckpointError, match=r"contains a run with another calibration \(batch 1\): give"):
        _bytes(tmp_path, em(), model, data)
    with pytest.raises(CheckpointError, match=r"contains a run with another calibration \(batch 3\): give"):
        _bytes(tmp_path, em(), model, images(4))


def test_another_teacher_is_refused_where_it_is_used(model: nn.Module, tmp_path: Path) -> None:
    bgd.quantize(model, images(), TRAINED, checkpoint=tmp_path, teacher=SmallResNet(), progress=False)
    with pytest.raises(CheckpointError, match=r"contains a run with another teacher \(stem.weight, .*\): give"):
        bgd.quantize(model, images(), TRAINED, checkpoint=tmp_path, progress=False)


def test_another_version_is_refused(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _bytes(tmp_path, em(), model)
    monkeypatch.setattr(bgd_plugin.quantization.fingerprint, "__version__", "9.9")
    with pytest.raises(CheckpointError, match=r'another version \(bgd-plugin was "\d\S+", is "9.9"\)'):
        _bytes(tmp_path, em(), model)


def test_every_difference_is_named_at_once(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    expected = (
        r"another config \(.*\), another network \(.*\), another calibration \(.*\), another teacher \(.*\): give"
    )
    with pytest.raises(CheckpointError, match=expected):
        _bytes(tmp_path, em(seed=1), randomized(SmallResNet()), images(seed=9))


def _stop_after_steps(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Save after every step of training, and stop at the end of step `count`; returns the steps as they are done."""
    done: list[int] = []

    def counted(step: Any) -> Any:
        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(done) == count:
                raise KeyboardInterrupt
            done.append(1)
            return step(self, *args, **kwargs)

        return counting

    for optimizer in (torch.optim.SGD, torch.optim.Adam):
        monkeypatch.setattr(optimizer, "step", counted(optimizer.step))
    monkeypatch.setattr(bgd_plugin.support.steps, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(bgd_plugin.support.steps, "_SHARE", float("inf"))
    return done


def _longer(trained: Literal["all", "codebooks"]) -> bgd.BGDConfig:
    return em(
        batchnorm="matched",
        distillation=DistillationConfig(steps=3, batch_size=8, learning_rate=0.01),
        finetuning=FinetuningConfig(steps=8, trained=trained),
    )


def _seeded() -> nn.Module:
    torch.manual_seed(0)
    network: nn.Module = randomized(SmallResNet())
    return network


@functools.cache
def _in_one_go(trained: Literal["all", "codebooks"]) -> bytes:
    return _bytes(None, _longer(trained), _seeded())


@pytest.mark.parametrize(
    ("stopped", "trained"),
    [(n, "codebooks") for n in (1, 2, 3, 4, 11, 13, 14, 16, 17, 19)] + [(n, "all") for n in (13, 19)],
)
def test_training_that_was_stopped_goes_on_at_its_step_and_ends_in_the_same_bytes(
    stopped: int, trained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = _longer(trained), _seeded()
    expected = _in_one_go(trained)
    with monkeypatch.context() as patch:
        _stop_after_steps(stopped, patch)
        with pytest.raises(KeyboardInterrupt):
            _bytes(tmp_path, config, model)
    rest = _stop_after_steps(99, monkeypatch)
    assert _bytes(tmp_path, config, model) == expected
    assert len(rest) == 4 * 3 + 8 - stopped
    names = [f"layer-{i:04d}.safetensors" for i in range(4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["finetuning.steps.safetensors", *names, "run.json"]


class _Drawn:
    """Calibration data that draws from the global generator at each walk, as a shuffling DataLoader does."""

    def __iter__(self) -> Iterator[Tensor]:
        samples = torch.cat(images())
        yield from samples[torch.randperm(len(samples))].split(4)


class _Numbered:
    """Calibration data whose walks have numbers, and that counts the batches it gave."""

    def __init__(self) -> None:
        self.number, self.given = 0, 0

    def set_epoch(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        samples = torch.cat(images())
        order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(self.number))
        for batch in samples[order].split(4):
            self.given += 1
            yield batch


@pytest.mark.parametrize("kind", [_Drawn, _Numbered])
def test_data_in_another_order_at_each_walk_goes_on_in_that_order(
    model: nn.Module, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = em(finetuning=FinetuningConfig(steps=10))
    torch.manual_seed(5)
    expected = _bytes(None, config, model, kind())
    assert _bytes(None, config, model, images()) != expected
    with monkeypatch.context() as patch:
        _stop_after_steps(8, patch)
        torch.manual_seed(5)
        with pytest.raises(KeyboardInterrupt):
            _bytes(tmp_path, config, model, kind())
    torch.manual_seed(5)
    data = kind()
    assert _bytes(tmp_path, config, model, data) == expected
    if kind is _Numbered:  # the calibration set, then walk 3 from its start: earlier walks are not read again
        assert data.given == 3 + 3 + 1


def test_ctrl_c_says_how_the_run_goes_on(model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _stop_after_steps(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as stop:
        _bytes(tmp_path / "run", TRAINED, model)
    assert stop.value.__notes__ == [f"progress is saved in {tmp_path / 'run'}; the same call resumes there"]
    with pytest.raises(KeyboardInterrupt) as stop:
        _bytes(None, TRAINED, model)
    assert stop.value.__notes__ == ['no progress saved; pass checkpoint="FOLDER" to be able to resume']


def test_a_finished_training_is_not_done_again(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _bytes(tmp_path, _longer("all"), model)
    again = _stop_after_steps(0, monkeypatch)
    assert _bytes(tmp_path, _longer("all"), model) == expected
    assert again == []


def test_a_damaged_file_of_training_says_what_to_delete(model: nn.Module, tmp_path: Path) -> None:
    expected = _bytes(tmp_path, _longer("all"), model)
    file = tmp_path / "finetuning.steps.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", whole.replace(b"step", b"stop", 1), whole.replace(b"tensor", b"tomato", 1)):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name} is damaged .*: delete it to start this stage again"):
            _bytes(tmp_path, _longer("all"), model)
    file.unlink()
    assert _bytes(tmp_path, _longer("all"), model) == expected


def test_leftovers_of_a_killed_process_are_removed(model: nn.Module, tmp_path: Path) -> None:
    for number in (1, 99):  # one whose file is written again, and one that no layer has
        (tmp_path / f".layer-{number:04d}.safetensors.tmp").write_bytes(b"half")
    _bytes(tmp_path, em(), model)
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_layer_file_says_what_to_delete(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    file = sorted(tmp_path.glob("layer-*"))[1]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged .*: delete it to fit the layer again"):
        _bytes(tmp_path, em(), model)


def test_a_layer_file_of_another_layer_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    first, second = sorted(tmp_path.glob("layer-*"))[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{second.name} is damaged .*shapes .*delete it to fit the layer again"):
        _bytes(tmp_path, em(), model)


def test_a_damaged_description_says_what_to_delete(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged"):
        _bytes(tmp_path, em(), model)


def test_nothing_but_finished_files_lies_in_the_folder(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"layer-{i:04d}.safetensors" for i in range(4)] + ["run.json"]


@pytest.mark.parametrize("stopped", [1, 3, 4, 5])
def test_reconstruction_that_was_stopped_goes_on_at_its_step_and_ends_in_the_same_bytes(
    model: nn.Module, stopped: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = em(batchnorm="matched", reconstruction=bgd.ReconstructionConfig(steps=3, learning_rate=0.01))
    expected = _bytes(None, config, model)
    with monkeypatch.context() as patch:
        _stop_after_steps(stopped, patch)
        with pytest.raises(KeyboardInterrupt):
            _bytes(tmp_path, config, model)
    rest = _stop_after_steps(99, monkeypatch)
    assert _bytes(tmp_path, config, model) == expected
    blocks = len(list(tmp_path.glob("block-*.steps.safetensors")))
    assert blocks > 1
    assert len(rest) == 3 * blocks - stopped


def test_the_steps_of_a_finished_layer_are_forgotten(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those that a run left behind which was killed right after the layer was kept."""
    monkeypatch.setattr("bgd_plugin.support.steps.SAVE_SECONDS", 0.0)
    monkeypatch.setattr("bgd_plugin.support.steps._SHARE", float("inf"))
    config = em(distillation=bgd.DistillationConfig(steps=2, batch_size=8))
    for _ in range(2):
        _bytes(tmp_path, config, model)
        assert not list(tmp_path.glob("*.steps.safetensors"))
        (tmp_path / "layer-0001.steps.safetensors").touch()


class _Weighed(nn.Module):
    """Takes a second input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) * scale))


def test_inputs_by_name_count_as_calibration_data_too(tmp_path: Path) -> None:
    net, x = _Weighed().eval(), torch.randn(8, 12)
    bgd.quantize(net, [{"x": x, "scale": torch.ones(8, 1)}], em(), checkpoint=tmp_path / "run", progress=False)
    with pytest.raises(CheckpointError, match="another calibration"):
        bgd.quantize(net, [{"x": x, "scale": torch.zeros(8, 1)}], em(), checkpoint=tmp_path / "run", progress=False)
