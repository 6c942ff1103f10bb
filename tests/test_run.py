"""A run that was stopped goes on from the last finished layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import CheckpointError, DistillationConfig, FinetuningConfig
from bgd_plugin.run import Run
from bgd_plugin.storage import file_bytes, stored
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
    with pytest.raises(
        CheckpointError, match="holds a run with another config: give the same as then, or an empty fol"
    ):
        _bytes(tmp_path, em(seed=1), model)


def test_another_network_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    with pytest.raises(CheckpointError, match="holds a run with another network and another teacher: give"):
        _bytes(tmp_path, em(), randomized(SmallResNet()))


def test_other_calibration_data_is_refused(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    with pytest.raises(CheckpointError, match="holds a run with another calibration: give"):
        _bytes(tmp_path, em(), model, images(seed=9))


def test_another_teacher_is_refused_where_it_is_used(model: nn.Module, tmp_path: Path) -> None:
    bgd.quantize(model, images(), TRAINED, checkpoint=tmp_path, teacher=SmallResNet(), progress=False)
    with pytest.raises(CheckpointError, match="holds a run with another teacher: give"):
        bgd.quantize(model, images(), TRAINED, checkpoint=tmp_path, progress=False)


def test_every_difference_is_named_at_once(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    with pytest.raises(
        CheckpointError, match="another config and another network and another calibration and another teacher"
    ):
        _bytes(tmp_path, em(seed=1), randomized(SmallResNet()), images(seed=9))


def test_a_damaged_layer_file_says_what_to_delete(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    file = sorted(tmp_path.glob("layer-*"))[1]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=rf"{file.name} is damaged .*: delete it, the layer will be fitted again"):
        _bytes(tmp_path, em(), model)


def test_a_damaged_description_says_what_to_delete(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run.json is damaged"):
        _bytes(tmp_path, em(), model)


def test_nothing_but_finished_files_lies_in_the_folder(model: nn.Module, tmp_path: Path) -> None:
    _bytes(tmp_path, em(), model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"layer-{i:04d}.safetensors" for i in range(4)] + ["run.json"]
