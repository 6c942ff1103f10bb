"""One run's folder, step by step, without a network that is fitted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from bgd_plugin import BGDConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import CheckpointError
from bgd_plugin.fitting import FittedLayer
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.quantization.resume import Run, holds_run, stage

LAYER = PlannedLayer(
    **dict.fromkeys(("name", "target", "kind", "family"), "a"),
    weight_shape=(8, 8),
    block_size=4,
    codebook_size=4,
    calls=("a",),
)
FIT = FittedLayer(
    codebook=torch.randn(4, 4),
    codes=torch.randint(0, 4, (8, 2)),
    row_scale=torch.rand(8),
    bias_shift=torch.rand(8),
    warnings=("one", "two"),
)
NET, DATA = nn.Linear(8, 8), [Batch((torch.ones(2, 8),))]


def _run(folder: Path | None, **fields: Any) -> Run:
    return Run.open(folder, NET, BGDConfig(**fields), DATA)


def _same(one: FittedLayer | None, other: FittedLayer) -> bool:
    values = [dataclasses.asdict(fit) for fit in (one, other) if fit is not None]
    return len(values) == 2 and all(
        torch.equal(value, values[1][name]) if isinstance(value, torch.Tensor) else value == values[1][name]
        for name, value in values[0].items()
    )


@pytest.mark.parametrize("fields", [{}, {"row_scale": None}, {"bias_shift": None}, {"warnings": ()}])
def test_a_fit_comes_back_as_it_was(fields: dict[str, Any], tmp_path: Path) -> None:
    fit = dataclasses.replace(FIT, **fields)
    _run(tmp_path).store(3, LAYER, fit)
    again = _run(tmp_path)
    assert _same(again.finished(3, LAYER), fit)
    assert again.finished(2, LAYER) is None
    assert list(again.fits) == ["a"] and again.fits["a"][0] is LAYER


def test_without_a_folder_only_an_earlier_pass_is_known() -> None:
    run = _run(None)
    run.store(0, LAYER, FIT)
    assert run.folder is None and run.fits["a"][1] is FIT
    assert run.finished(0, LAYER) is None  # of this pass
    later = Run.open(None, NET, BGDConfig(), DATA, known=run.fits)
    assert later.finished(0, LAYER) is FIT and later.fits["a"] == (LAYER, FIT)
    for fields in ({"name": "b"}, {"block_size": 2}, {"codebook_size": 2}, {"codes": "entropy"}, {"size_bytes": 9}):
        if fields.get("codes") == "entropy":
            fields = {"codes": "entropy", "block_size": 1}
        assert later.finished(0, dataclasses.replace(LAYER, **fields)) is None  # type: ignore[arg-type]
    later.forget_fits()
    assert later.finished(0, LAYER) is None


def test_a_file_goes_before_an_earlier_pass(tmp_path: Path) -> None:
    _run(tmp_path).store(0, LAYER, FIT)
    other = dataclasses.replace(FIT, codebook=FIT.codebook + 1)
    run = Run.open(tmp_path, NET, BGDConfig(), DATA, known={"a": (LAYER, other)})
    assert _same(run.finished(0, LAYER), FIT)


@pytest.mark.parametrize("fields", [{"block_size": 2}, {"codebook_size": 8}, {"weight_shape": (4, 8)}])
def test_a_file_of_other_sizes_is_damaged(fields: dict[str, Any], tmp_path: Path) -> None:
    _run(tmp_path).store(0, LAYER, FIT)
    with pytest.raises(CheckpointError, match=r"is damaged \(shapes .*delete it to fit the layer again"):
        _run(tmp_path).finished(0, dataclasses.replace(LAYER, **fields))


def test_a_stream_has_as_many_levels_as_its_fit_found(tmp_path: Path) -> None:
    layer = dataclasses.replace(LAYER, block_size=1, codes="entropy", codebook_size=64)
    fit = dataclasses.replace(FIT, codebook=torch.randn(9, 1), codes=torch.randint(0, 9, (8, 8)))
    _run(tmp_path).store(0, layer, fit)
    assert _same(_run(tmp_path).finished(0, layer), fit)


@pytest.mark.parametrize("is_stored", [True, False])
def test_steps_of_a_layer_go_once_the_layer_is_stored_or_read(is_stored: bool, tmp_path: Path) -> None:
    run, steps = _run(tmp_path), tmp_path / f"{stage(0)}.steps.safetensors"
    other = tmp_path / f"{stage(1)}.steps.safetensors"
    other.touch()
    if is_stored:
        steps.touch()
        run.store(0, LAYER, FIT)
    else:
        run.store(0, LAYER, FIT)
        steps.touch()
        run.finished(0, LAYER)
    assert not steps.exists() and other.exists()


def test_the_description_is_written_once_and_compared(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "run"
    assert not holds_run(tmp_path)
    _run(folder)
    assert holds_run(folder)
    content = (folder / "run.json").read_bytes()
    (folder / ".left.tmp").touch()
    _run(folder)
    assert (folder / "run.json").read_bytes() == content and not (folder / ".left.tmp").exists()
    with pytest.raises(CheckpointError, match=r"a run with another config \(seed was 0, is 1\): give the same"):
        _run(folder, seed=1)
    with pytest.raises(CheckpointError, match=r"another calibration \(batch 0\)"):
        Run.open(folder, NET, BGDConfig(), [Batch((torch.zeros(2, 8),))])
    with pytest.raises(CheckpointError, match="another teacher"):
        Run.open(folder, NET, BGDConfig(), DATA, teacher=nn.Linear(8, 8))


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_description_is_said(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run.json is damaged.*start again in an empty folder"):
        _run(tmp_path)


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*file.run cannot be created"):
        _run(tmp_path / "file" / "run")


def test_ctrl_c_says_whether_there_is_progress(tmp_path: Path) -> None:
    for folder, said in ((tmp_path, "progress is saved in"), (None, "no progress saved; pass checkpoint=")):
        with pytest.raises(KeyboardInterrupt) as stopped, _run(folder).says_how_to_go_on():
            raise KeyboardInterrupt
        assert stopped.value.__notes__[0].startswith(said)
    with pytest.raises(OSError) as failed, _run(None).says_how_to_go_on():
        raise OSError
    assert not hasattr(failed.value, "__notes__")


def test_warnings_of_a_file_that_has_none_are_none(tmp_path: Path) -> None:
    _run(tmp_path)
    tensors = {"codebook": FIT.codebook, "codes": FIT.codes}
    safetensors.torch.save_file(tensors, tmp_path / f"{stage(0)}.safetensors")
    found = _run(tmp_path).finished(0, LAYER)
    assert found is not None and found.warnings == () and found.row_scale is None
    assert json.loads((tmp_path / "run.json").read_text())["config"]["seed"] == 0
