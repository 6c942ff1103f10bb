"""NVIDIA ModelOpt: the mode "bgd", against the core; save and restore; chains with ModelOpt's own modes."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig, integration
from bgd_plugin.errors import CalibrationError, CheckpointError, ConfigError
from tests.adapters.digits import accuracy, digits, trained_on_digits
from tests.adapters.entrances import same_state
from tests.networks import PlainNet, same_outputs, vectors

pytest.importorskip("modelopt", reason="ModelOpt is not installed: pip install 'bgd-plugin[modelopt]'")

adapter: Any = bgd.load_adapter("modelopt")

import modelopt.torch.opt as mto  # noqa: E402
import modelopt.torch.quantization as mtq  # noqa: E402
import modelopt.torch.sparsity as mts  # noqa: E402

SMALL = {"conv": LayerConfig(block_size=9, codebook_size=32), "linear": LayerConfig(block_size=4, codebook_size=16)}


def loop(data: list[torch.Tensor]) -> Any:
    def forward_loop(model: nn.Module) -> None:
        for batch in data:
            model(batch)

    return forward_loop


def test_calibrated_gives_the_cores_codes_and_accuracy() -> None:
    model, data = trained_on_digits(), list(digits()[0][:200].split(100))
    expected = bgd.quantize(model, data, BGDConfig(**SMALL, max_divergence=None), progress=False)
    result = adapter.quantize(model, BGDConfig(**SMALL, max_divergence=None), forward_loop=loop(data))
    assert result is model
    assert same_state(model, expected.model)
    assert accuracy(model) == accuracy(expected.model) > 0.8
    assert adapter.report(model)["compressed_bytes"] == expected.report.compressed_bytes


def test_batches_do_as_well_as_a_loop() -> None:
    model = PlainNet()
    by_loop = adapter.quantize(copy.deepcopy(model), None, loop(vectors()))
    assert same_state(adapter.quantize(model, None, vectors()), by_loop)


def test_apply_mode_alone_is_data_free() -> None:
    model = PlainNet()
    expected = bgd.quantize_weights(model)
    mto.apply_mode(model, [("bgd", {})], registry=adapter.BGDModeRegistry)
    assert same_state(model, expected.model)
    assert str(mto.conversion.get_mode(model)) == "bgd"


def test_settings_by_name_in_modelopts_words() -> None:
    model = PlainNet()
    config = {"first_layer": {"block_size": 4}, "overrides": {"0": {"enable": False}, "[24]": {"block_size": 8}}}
    adapter.quantize(model, config, forward_loop=loop(vectors()))
    assert {path: sizes[0] for path, sizes in integration.placement_of(model).items()} == {"2": 8, "4": 8}


def test_every_field_of_the_core_is_a_field_of_the_config() -> None:
    data = vectors()
    settings: dict[str, Any] = {"method": "em", "seed": 3, "em_iterations": 4, "finetuning": {"steps": 2}}
    model = PlainNet()
    expected = bgd.quantize(model, data, BGDConfig.from_dict(settings), progress=False)
    adapter.quantize(model, settings, forward_loop=loop(data))
    assert same_state(model, expected.model)


def test_saved_and_restored_in_a_fresh_process_bit_for_bit(tmp_path: Path) -> None:
    model, data = PlainNet(), vectors()
    adapter.quantize(model, forward_loop=loop(data))
    mto.save(model, tmp_path / "model.pt")
    torch.save((data[0], model(data[0]).detach()), tmp_path / "expected.pt")
    script = """
import torch, bgd_plugin
from tests.networks import PlainNet
bgd_plugin.load_adapter("modelopt")
import modelopt.torch.opt as mto
model = mto.restore(PlainNet(), "model.pt")
x, y = torch.load("expected.pt", weights_only=True)
assert torch.equal(model(x), y)
assert bgd_plugin.load_adapter("modelopt").report(model)["layers"]
"""
    root = Path(__file__).resolve().parents[2]
    path = f"import sys; sys.path[:0] = [{str(root)!r}, {str(root / 'adapters')!r}]\n"
    subprocess.run([sys.executable, "-c", path + script], cwd=tmp_path, check=True)


def test_restoring_without_the_adapter_says_so(tmp_path: Path) -> None:
    model = PlainNet()
    adapter.quantize(model)
    mto.save(model, tmp_path / "model.pt")
    script = "import modelopt.torch.opt as mto, torch\nmto.restore(torch.nn.Linear(2, 2), 'model.pt')"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Mode bgd not found in any registry" in done.stderr


def test_a_state_that_was_edited_is_an_error(tmp_path: Path) -> None:
    model = PlainNet()
    adapter.quantize(model)
    state = copy.deepcopy(mto.modelopt_state(model))
    metadata = state["modelopt_state_dict"][0][1]["metadata"]
    metadata["placement"]["2"] = [5, 16]
    metadata["placement"]["nothing"] = [4, 16]
    with pytest.raises(
        CheckpointError, match=r"(?s)'2': 32 weights per row, blocks of 5.*'nothing': the network has no"
    ):
        mto.restore_from_modelopt_state(PlainNet(), state)
    del metadata["placement"]
    with pytest.raises(CheckpointError, match="no placement"):
        mto.restore_from_modelopt_state(PlainNet(), state)


def test_a_file_with_a_tensor_missing_is_an_error(tmp_path: Path) -> None:
    model = PlainNet()
    adapter.quantize(model)
    mto.save(model, tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    del content["model_state_dict"]["2.codes"]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(RuntimeError, match=r"2\.codes"):
        mto.restore(PlainNet(), tmp_path / "model.pt")


def _edited(path: Path, name: str, change: Any) -> None:
    content = torch.load(path, weights_only=True)
    content["model_state_dict"][name] = change(content["model_state_dict"][name])
    torch.save(content, path)


def test_edited_codes_are_an_error(tmp_path: Path) -> None:
    model = PlainNet()
    adapter.quantize(model)
    mto.save(model, tmp_path / "model.pt")
    _edited(tmp_path / "model.pt", "2.codes", lambda codes: codes.flip(0))
    with pytest.raises(CheckpointError, match="the codes of 2 are not those that were saved"):
        mto.restore(PlainNet(), tmp_path / "model.pt")


def test_a_missing_file_and_one_cut_short_are_errors(tmp_path: Path) -> None:
    model = PlainNet()
    adapter.quantize(model)
    mto.save(model, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises((OSError, RuntimeError)):
        mto.restore(PlainNet(), tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError):
        mto.restore(PlainNet(), tmp_path / "nothing.pt")


def test_frozen_norms_and_a_restored_copy_that_is_trained_and_saved_again(tmp_path: Path) -> None:
    model, data = trained_on_digits(), list(digits()[0][:200].split(100))
    settings: dict[str, Any] = SMALL | {"freeze_norms": True}
    expected = bgd.quantize(model, data, BGDConfig(**settings, max_divergence=None), progress=False)
    adapter.quantize(model, BGDConfig(**settings, max_divergence=None), forward_loop=loop(data))
    assert same_state(model, expected.model)
    mto.save(model, tmp_path / "model.pt")
    again = copy.deepcopy(mto.restore(trained_on_digits(), tmp_path / "model.pt"))
    with torch.no_grad():
        again.get_submodule("conv1").codebook.mul_(1.01)
    mto.save(again, tmp_path / "again.pt")
    assert same_state(again, mto.restore(trained_on_digits(), tmp_path / "again.pt"))


def test_after_sparsity_and_its_export() -> None:
    model, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32)), vectors(features=16)
    model = mts.sparsify(model, "sparse_magnitude")
    with pytest.raises(ConfigError, match=r"SparseLinear of a ModelOpt mode.*export first"):
        adapter.quantize(model, forward_loop=loop(data))
    model = mts.export(model)
    adapter.quantize(model, forward_loop=loop(data))
    assert set(integration.placement_of(model)) == {"2"}


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"codebook_size": 8}, (4, 8)),
        ({"block_size": 8}, (8, 16)),
        ({"enable": True}, (4, 16)),
        ({"enable": True, "codebook_size": 8}, (4, 8)),
        ({"enable": False, "codebook_size": 8}, None),
        (None, None),
    ],
)
def test_overrides_in_part(entry: Any, expected: Any) -> None:
    model = PlainNet()
    config = {"linear": {"codebook_size": 16}, "overrides": {"2": entry}, "max_divergence": None}
    adapter.quantize(model, config, loop(vectors()))
    assert integration.placement_of(model).get("2") == expected


def test_an_override_that_switches_on_goes_before_one_that_switches_off() -> None:
    model = PlainNet()
    adapter.quantize(model, {"overrides": {"4": {"enable": True}, "*": {"enable": False}}}, loop(vectors()))
    assert set(integration.placement_of(model)) == {"4"}
    with pytest.raises(ConfigError, match=r"override '2': found .*bits"):
        adapter.quantize(PlainNet(), {"overrides": {"2": {"bits": 4}}}, loop(vectors()))


class Student(nn.Module):
    """Not a `Sequential`, which would run what ModelOpt adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.body = PlainNet()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.body(x)
        return result


def distilled(model: nn.Module) -> Any:
    """The model with ModelOpt's distillation around it: the logits of a float network are the aim."""
    import modelopt.torch.distill as mtd

    config = {"teacher_model": Student().eval(), "criterion": mtd.LogitsDistillationLoss()}
    return mtd.convert(model, mode=[("kd_loss", config)])


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
def test_distillation_after_ours_trains_the_codebooks(tmp_path: Path) -> None:
    import modelopt.torch.distill as mtd

    model: Any = adapter.quantize(Student(), None, loop(vectors()))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    student = distilled(model)
    optimizer = torch.optim.SGD((p for p in student.parameters() if p.requires_grad), lr=1.0)
    student.train()
    student(vectors()[0])
    student.compute_kd_loss().backward()
    optimizer.step()
    model = mtd.export(student)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "body.2.codebook" in changed
    assert not any(name.endswith("codes") for name in changed)
    mto.save(model, tmp_path / "model.pt")
    again = mto.restore(Student(), tmp_path / "model.pt")
    assert same_state(model, again)


def test_distillation_before_ours_is_refused_until_its_export() -> None:
    import modelopt.torch.distill as mtd

    student = distilled(Student())
    with pytest.raises(ConfigError, match=r"ModelOpt mode.*distillation.*export first"):
        adapter.quantize(student, None, loop(vectors()))
    model = adapter.quantize(mtd.export(student), {"max_divergence": None}, loop(vectors()))
    assert set(integration.placement_of(model)) == {"body.2", "body.4"}


def pruned(model: nn.Module) -> nn.Module:
    """The model without some of its channels, by ModelOpt's search."""
    pytest.importorskip("torchprofile", reason="ModelOpt counts parameters by torchprofile, which is not installed")
    import modelopt.torch.prune as mtp

    images = torch.randn(4, 3, 12, 12)
    config = {
        "data_loader": [(images, torch.zeros(4))],
        "score_func": lambda m: 0.5,
        "verbose": False,
        "checkpoint": None,
    }
    result: nn.Module = mtp.prune(model, "fastnas", {"params": "80%"}, images, config)[0]
    return result


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 5),
    ).eval()


@pytest.mark.filterwarnings("ignore:modelopt data queue not filled:UserWarning")
def test_pruning_then_ours_and_never_after(tmp_path: Path) -> None:
    narrow = pruned(wide())
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in wide().parameters())
    images = [torch.randn(4, 3, 12, 12)]
    model = adapter.quantize(narrow.eval(), {"overrides": {"8": None}}, loop(images))
    assert "3" in integration.placement_of(model)
    mto.save(model, tmp_path / "model.pt")
    assert same_state(mto.restore(wide(), tmp_path / "model.pt"), model)
    with pytest.raises(Exception, match=r"bgd|fastnas|mode"):
        pruned(model)


def test_a_model_that_modelopt_has_quantized_is_an_error() -> None:
    model = PlainNet()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's own
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=loop(vectors()))
    with pytest.raises(ConfigError, match="QuantLinear of a ModelOpt mode"):
        adapter.quantize(model)


def test_modelopts_quantization_after_ours_is_refused() -> None:
    model = PlainNet()
    adapter.quantize(model)
    with pytest.raises(AssertionError, match="bgd does not allow quantize"):
        mtq.quantize(model, mtq.INT8_DEFAULT_CFG, forward_loop=loop(vectors()))


def test_two_configs_of_ours_on_one_layer_are_an_error_and_on_two_layers_are_not() -> None:
    model = PlainNet()
    adapter.quantize(model, {"overrides": {"4": {"enable": False}}})
    with pytest.raises(ConfigError, match="already quantized"):
        adapter.quantize(model, {"overrides": {"2": {"block_size": 2}}})
    adapter.quantize(model, {"overrides": {"4": {"block_size": 2}}})
    assert {path: sizes[0] for path, sizes in integration.placement_of(model).items()} == {"2": 4, "4": 2}
    state = mto.modelopt_state(model)
    fresh = mto.restore_from_modelopt_state(PlainNet(), state)
    fresh.load_state_dict(model.state_dict())
    assert same_outputs(model, fresh, vectors())


def test_names_that_match_nothing_and_unknown_fields_are_errors() -> None:
    with pytest.raises(ConfigError, match="override 'nothing' matches no layer"):
        adapter.quantize(PlainNet(), {"overrides": {"nothing": {"enable": False}}})
    with pytest.raises(ValueError, match="blocksize"):
        adapter.quantize(PlainNet(), {"blocksize": 4})
    with pytest.raises(ConfigError, match="enable='no'"):
        adapter.quantize(PlainNet(), {"overrides": {"2": {"enable": "no"}}})


def test_a_forward_loop_that_calls_nothing_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="without calling the model"):
        adapter.quantize(PlainNet(), forward_loop=lambda model: None)


def test_the_model_keeps_its_mode_and_hooks() -> None:
    model = PlainNet().train()
    adapter.quantize(model, forward_loop=loop(vectors()))
    assert all(module.training for module in model.modules())
    assert not model._forward_pre_hooks


def test_no_report_where_the_mode_was_not_applied() -> None:
    with pytest.raises(ConfigError, match="was not applied"):
        adapter.report(PlainNet())
