"""The command line: each command on tiny networks and generated images, and what it says to mistakes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import bgd_plugin as bgd
from bgd_plugin.cli.app import app
from bgd_plugin.cli.options import Regime, settings_from, with_budget, with_distillation, with_finetuning

pytest.importorskip("PIL", reason="Pillow is not installed")
from PIL import Image

RUNNER = CliRunner()
NET = f"{__name__}:net"
SMALL = ["--size", "8", "--resize", "8", "--batch-size", "4"]


class Net(nn.Module):
    """A stem that stays float, and two layers that are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(torch.relu(self.stem(x))))).mean((2, 3)))


def net() -> nn.Module:
    """The same network at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


def number() -> int:
    """No network."""
    return 3


def _image(path: Path, seed: int, size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    for i in range(6):
        _image(tmp_path / "flat" / f"photo_{i:02d}_{i % 3}.png", i)
    return tmp_path / "flat"


@pytest.fixture
def file(tmp_path: Path, flat: Path) -> Path:
    path = tmp_path / "net.safetensors"
    done = RUNNER.invoke(app, ["quantize", NET, "--calibration", str(flat), "--output", str(path), *SMALL])
    assert done.exit_code == 0, done.output
    return path


def _fails(arguments: list[str], *words: str) -> None:
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("bgd-plugin: ")
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr


def test_plan_as_table_and_as_json() -> None:
    text = RUNNER.invoke(app, ["plan", NET])
    assert text.exit_code == 0
    assert "layers quantized" in text.stdout
    values = json.loads(RUNNER.invoke(app, ["plan", NET, "--json", "--override", "fc=float"]).stdout)
    assert [layer["name"] for layer in values["layers"]] == ["conv"]
    assert {"name": "fc", "reason": "override 'fc'"} in values["skipped"]


def test_plan_of_a_torchvision_network() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    arguments = ["plan", "torchvision:resnet18", "--regime", "paper-large", "--pointwise-block-size", "4", "--json"]
    done = RUNNER.invoke(app, arguments)
    assert json.loads(done.stdout)["paper_bytes"] / 2**20 == pytest.approx(1.029, rel=0.002)


def test_quantize_writes_the_file_and_the_reports(tmp_path: Path, flat: Path) -> None:
    out, page, report = tmp_path / "a.safetensors", tmp_path / "a.html", tmp_path / "a.json"
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(out), *SMALL]
    arguments += ["--report", str(page), "--json", str(report), "--seed", "1", "--override", "conv=9,4"]
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    values = json.loads(report.read_text())
    assert values["compressed_bytes"] == out.stat().st_size
    assert values["layers"][0]["codebook_size"] == 4
    assert page.read_text().startswith("<!doctype html>")
    assert "layers quantized" in done.stdout


def test_quantize_says_json_alone_on_stdout(tmp_path: Path, flat: Path) -> None:
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL, "--json", "-"]
    assert json.loads(RUNNER.invoke(app, arguments).stdout)["layers"]


def test_quantize_trains_with_a_teacher(tmp_path: Path, flat: Path) -> None:
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL, "--json", "-"]
    arguments += [
        "--distill-steps",
        "1",
        "--reconstruct-steps",
        "2",
        "--finetune-epochs",
        "2",
        "--finetune-mixing",
        "--images",
        "4",
        "--teacher",
        NET,
    ]
    values = json.loads(RUNNER.invoke(app, arguments).stdout)
    assert {"distill", "reconstruct", "finetune"} <= set(values["seconds"])


def test_norms_are_frozen_on_demand() -> None:
    sizes = []
    for more in ([], ["--freeze-norms"]):
        done = RUNNER.invoke(app, ["plan", "torchvision:resnet18", "--json", *more])
        sizes.append(json.loads(done.stdout)["compressed_bytes"])
    channels = 4800  # of resnet18's norms: mean and variance less, two bytes each
    assert 2 * 2 * channels <= sizes[0] - sizes[1] <= 2 * 2 * channels + 8192


def test_mixing_without_finetuning_is_an_error(tmp_path: Path, flat: Path) -> None:
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL]
    done = RUNNER.invoke(app, [*arguments, "--finetune-mixing"])
    assert done.exit_code != 0 and "give --finetune-epochs too" in done.stderr
    assert not (tmp_path / "a").exists()


def test_the_same_command_writes_the_same_bytes(tmp_path: Path, flat: Path, file: Path) -> None:
    again = tmp_path / "again.safetensors"
    RUNNER.invoke(app, ["quantize", NET, "--calibration", str(flat), "--output", str(again), *SMALL])
    assert again.read_bytes() == file.read_bytes()


def test_quantize_goes_on_after_ctrl_c(tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL]
    monkeypatch.setattr(bgd, "quantize", stopped)
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 130
    assert "no progress saved; pass --checkpoint FOLDER" in done.stderr
    done = RUNNER.invoke(app, [*arguments, "--checkpoint", "run"])
    assert done.exit_code == 130
    assert "progress is saved in run; add --resume to the same command" in done.stderr
    assert not (tmp_path / "a").exists()


def test_sigterm_ends_as_ctrl_c_does(tmp_path: Path, flat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(bgd, "quantize", terminated)
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL]
    done = RUNNER.invoke(app, [*arguments, "--checkpoint", "run"])
    assert done.exit_code == 143
    assert done.stderr.strip().endswith(
        "stopped; progress is saved in run; add --resume to the same command to continue"
    )
    assert signal.getsignal(signal.SIGTERM) is before


def test_resume_goes_on_and_never_begins(tmp_path: Path, flat: Path, file: Path) -> None:
    run = str(tmp_path / "run")
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a"), *SMALL]
    _fails([*arguments, "--resume"], "--resume: give --checkpoint FOLDER")
    _fails([*arguments, "--resume", "--checkpoint", run], "contains no run: leave --resume out")
    assert RUNNER.invoke(app, [*arguments, "--checkpoint", run]).exit_code == 0
    assert RUNNER.invoke(app, [*arguments, "--checkpoint", run, "--resume"]).exit_code == 0
    assert (tmp_path / "a").read_bytes() == file.read_bytes()
    _fails([*arguments, "--checkpoint", run, "--resume", "--seed", "3"], "another config (seed was 0, is 3)")


def test_inspect_adds_up_to_the_file(file: Path) -> None:
    values = json.loads(RUNNER.invoke(app, ["inspect", str(file), "--json"]).stdout)
    assert sum(values["parts_bytes"].values()) == values["file_bytes"] == file.stat().st_size
    assert [layer["name"] for layer in values["layers"]] == ["conv", "fc"]
    assert values["layers"][0]["weight_shape"] == [16, 8, 3, 3]
    text = RUNNER.invoke(app, ["inspect", str(file)]).stdout
    assert "whole file" in text
    assert "16×8×3×3" in text


def test_evaluate_counts_what_the_networks_answer(file: Path, flat: Path) -> None:
    done = RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL, "--float", "--json"])
    values = json.loads(done.stdout)
    assert values["images"] == 6
    for which in ("float", "compressed"):
        given = values[which]["answers"]
        assert [answer["label"] for answer in given] == [0, 1, 2, 0, 1, 2]
        assert values[which]["top1"] == sum(a["classes"][0] == a["label"] for a in given) / 6
        assert values[which]["top5"] == 1.0
    text = RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL]).stdout
    assert "compressed" in text
    assert "float" not in text


def test_evaluate_answers_as_the_loaded_network(file: Path, flat: Path) -> None:
    from bgd_plugin.cli.images import Preprocessing, opened

    values = json.loads(
        RUNNER.invoke(app, ["evaluate", NET, str(file), "--images", str(flat), *SMALL, "--json"]).stdout
    )
    inputs = torch.stack([Preprocessing(size=8, resize=8)(opened(path)) for path in sorted(flat.iterdir())])
    with torch.no_grad():
        expected = bgd.load(file, like=net().eval())(inputs).argmax(1).tolist()
    assert [answer["classes"][0] for answer in values["compressed"]["answers"]] == expected


def test_folders_of_classes_are_numbered_by_name(tmp_path: Path) -> None:
    from bgd_plugin.cli.images import labelled

    for i, name in enumerate(("zebra", "ant", "bee")):
        _image(tmp_path / name / "1.png", i)
    assert {path.parent.name: label for path, label in labelled(tmp_path)} == {"ant": 0, "bee": 1, "zebra": 2}


def test_preprocessing_equals_torchvisions() -> None:
    transforms = pytest.importorskip("torchvision.transforms", reason="torchvision is not installed")
    from bgd_plugin.cli.images import Preprocessing

    values = torch.randint(0, 256, (37, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    image, ours = Image.fromarray(values.numpy()), Preprocessing(size=20, resize=25)
    steps = [transforms.Resize(25), transforms.CenterCrop(20), transforms.ToTensor()]
    theirs = transforms.Compose([*steps, transforms.Normalize(ours.mean, ours.std)])
    torch.testing.assert_close(ours(image), theirs(image))


def test_training_walks_see_all_images_in_random_crops(flat: Path) -> None:
    from bgd_plugin.cli.images import CalibrationImages, Preprocessing

    data = CalibrationImages(flat, Preprocessing(size=8, resize=8), images=4, batch_size=4)
    assert data.steps_per_epoch == 2
    walks = [torch.cat(list(data)) for _ in range(3)]
    assert [len(walk) for walk in walks] == [4, 6, 6]
    assert not torch.equal(walks[1], walks[2])
    again = CalibrationImages(flat, Preprocessing(size=8, resize=8), images=4, batch_size=4)
    assert all(torch.equal(torch.cat(list(again)), walk) for walk in walks)


def test_weights_come_from_files(tmp_path: Path, flat: Path, file: Path) -> None:
    import safetensors.torch

    from bgd_plugin.cli.models import named_model

    state = {k: v + 1 for k, v in net().state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    for name in ("net.pth", "plain.safetensors"):
        found = named_model(NET, str(tmp_path / name)).model
        assert torch.equal(found.state_dict()["fc.weight"], state["fc.weight"])
        assert not found.training


def test_random_weights_are_the_same_at_each_call() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from bgd_plugin.cli.models import named_model

    before = torch.get_rng_state()
    one, two = (named_model("torchvision:squeezenet1_1") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not one.has_weights
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_no_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    _fails(["plan", NET, "--weights", str(tmp_path / "module.pth")], "not a plain state dict")
    _fails(["plan", NET, "--weights", str(tmp_path / "text.pth")], "not a plain state dict")
    _fails(["plan", NET, "--weights", str(tmp_path / "other.pth")], "does not fit the network", "stem.weight")
    _fails(["plan", NET, "--weights", str(tmp_path / "none.pth")], "file not found")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnet18", "give torchvision:NAME"),
        ("no_such_package:net", "No module named 'no_such_package'"),
        ("torch:no_such_net", "torch has no 'no_such_net'"),
        (f"{__name__}:number", "is a int"),
    ],
)
def test_names_that_lead_nowhere(name: str, word: str) -> None:
    _fails(["plan", name], word)


def test_a_torchvision_name_that_is_nearly_right() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    _fails(["plan", "torchvision:resnet19"], "no model 'resnet19'", "resnet18")


def test_mistakes_in_options(tmp_path: Path, flat: Path, file: Path) -> None:
    quantize = ["quantize", NET, "--calibration", str(flat), "--output", str(tmp_path / "a")]
    (tmp_path / "bad.json").write_text("{")
    _fails(["plan", NET, "--override", "conv"], "GLOB=block,codebook")
    _fails(["plan", NET, "--override", "nothing*=float"], "matches no layer")
    _fails(["plan", NET, "--config", str(tmp_path / "bad.json")], "bad.json")
    _fails(["plan", NET, "--config", str(tmp_path / "bad.json"), "--regime", "paper-small"], "only one of them")
    _fails([*quantize, "--mean", "1,2"], "three numbers")
    _fails([*quantize, "--size", "300"], "size=300")
    _fails([*quantize, "--device", "toaster"], "--device")
    _fails([*quantize, "--report", str(tmp_path / "no" / "a.html")], "does not exist: create it first")
    _fails(["inspect", str(tmp_path / "bad.json")], "not a whole safetensors file")
    _fails(["inspect", str(tmp_path / "none")], "file not found")
    assert not (tmp_path / "a").exists()


def test_mistakes_in_folders(tmp_path: Path, flat: Path, file: Path) -> None:
    evaluate = ["evaluate", NET, str(file), *SMALL, "--images"]
    (tmp_path / "empty").mkdir()
    _image(tmp_path / "unlabelled" / "cat.png", 0)
    _image(tmp_path / "beyond" / "7.png", 0)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_text("no image")
    _image(tmp_path / "mixed" / "1.png", 0)
    _image(tmp_path / "mixed" / "ant" / "1.png", 0)
    _fails([*evaluate, str(tmp_path / "none")], "folder not found")
    _fails([*evaluate, str(tmp_path / "empty")], "no images found")
    _fails([*evaluate, str(tmp_path / "unlabelled")], "'cat.png' has no label")
    _fails([*evaluate, str(tmp_path / "beyond")], "label 7", "3 classes")
    _fails([*evaluate, str(tmp_path / "broken")], "cannot be read as an image")
    _fails([*evaluate, str(tmp_path / "mixed")], "one or the other")


def test_options_become_settings(tmp_path: Path) -> None:
    paper = settings_from(Regime.paper_small, None, ["fc=float", "layer4.*=18"], 1024, 8)
    assert paper.linear == bgd.LayerConfig(block_size=4, codebook_size=1024)
    assert paper.pointwise_conv == bgd.LayerConfig(block_size=8)
    assert paper.overrides == (("fc", None), ("layer4.*", bgd.LayerConfig(block_size=18)))
    assert with_distillation(paper, 7, True).distillation == bgd.DistillationConfig(steps=7)
    assert with_distillation(paper, 7, False).distillation is None
    assert with_finetuning(paper, None, True, 10).finetuning == bgd.FinetuningConfig(steps=90, trained="codebooks")
    assert with_finetuning(paper, 2, True, 10).finetuning == bgd.FinetuningConfig(steps=20, trained="codebooks")
    assert with_finetuning(paper, 2, False, 10).finetuning is None
    mixed = with_finetuning(bgd.BGDConfig(max_divergence=None), 2, True, 10, mixing=True).finetuning
    assert mixed == bgd.FinetuningConfig(steps=20, mixing=True)
    assert with_finetuning(bgd.BGDConfig(max_divergence=None), None, True, 10).finetuning is None
    (tmp_path / "a.json").write_text(paper.to_json())
    assert settings_from(Regime.default, tmp_path / "a.json", None, None, None) == paper


def test_help_names_the_commands() -> None:
    done = RUNNER.invoke(app, ["--help"])
    assert done.exit_code == 0
    for command in ("plan", "quantize", "inspect", "evaluate", "demo"):
        assert command in done.stdout


def test_help_imports_no_framework() -> None:
    code = (
        "import sys\nfrom bgd_plugin.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torchvision', 'PIL', 'timm', 'transformers', 'matplotlib') if m in sys.modules])\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bgd.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("budget", [["--target-size", "3.2kB"], ["--target-ratio", "2"]])
def test_a_budget_on_the_command_line(tmp_path: Path, flat: Path, budget: list[str]) -> None:
    out, report = tmp_path / "a.safetensors", tmp_path / "a.json"
    arguments = ["quantize", NET, "--calibration", str(flat), "--output", str(out), *SMALL, "--json", str(report)]
    done = RUNNER.invoke(app, [*arguments, *budget])
    assert done.exit_code == 0, done.output
    assert "budget: " in done.stdout
    target = 3200 if budget[0] == "--target-size" else json.loads(report.read_text())["original_bytes"] / 2
    assert out.stat().st_size <= target
    assert "estimated from the weights alone" in RUNNER.invoke(app, ["plan", NET, *budget]).stdout


def test_sizes_with_units() -> None:
    sizes = {"5MB": 5_000_000, "5 mib": 5 * 2**20, "1.5kB": 1500, "700": 700, "2KiB": 2048, "1GB": 10**9, "9B": 9}
    for text, size in sizes.items():
        assert with_budget(bgd.BGDConfig(max_divergence=None), text, None).target_bytes == size
    assert with_budget(bgd.BGDConfig(target_bytes=9), None, 7.5) == bgd.BGDConfig(target_ratio=7.5)
    for text in ("5 elephants", "MB", "-3MB", "1e6"):
        _fails(["plan", NET, "--target-size", text], f"--target-size '{text}': give a number and a unit")
    _fails(["plan", NET, "--target-size", "1MB", "--target-ratio", "3"], "give only one of them")
    _fails(["plan", NET, "--target-size", "1kB"], "the least possible size is")


def test_plan_reads_the_weights_where_zeros_are_to_be_preserved(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(bgd.BGDConfig(preserve_zeros=True, max_divergence=None).to_json())
    done = RUNNER.invoke(
        app, ["plan", "tests.quantization.test_preserve_zeros:pruned", "--config", str(file), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert {layer["name"]: layer["mask_form"] for layer in json.loads(done.stdout)["layers"]}["conv1"] == "2:4"


def test_export_writes_a_file_for_another_runtime(tmp_path: Path, file: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    output = tmp_path / "net.onnx"
    done = RUNNER.invoke(app, ["export", str(file), NET, "--output", str(output), "--shape", "2,3,8,8", "--dynamic"])
    assert done.exit_code == 0, done.output
    assert f"{output}: {output.stat().st_size:,} bytes" in done.stdout
    assert "largest difference" in done.stdout


def test_export_refuses_what_it_does_not_know(tmp_path: Path, file: Path) -> None:
    _fails(["export", str(file), NET, "--output", str(tmp_path / "net.xyz"), "--shape", "2,3,8,8"], ".xyz", ".onnx")
    _fails(["export", str(file), NET, "--shape", "2,3,x"], "--shape", "1,3,224,224")


def test_plan_measures_the_curve_on_images(tmp_path: Path, flat: Path) -> None:
    picture = tmp_path / "curve.svg"
    images = ["--calibration", str(flat), "--size", "8", "--resize", "8"]
    done = RUNNER.invoke(app, ["plan", NET, *images, "--picture", str(picture), "--max-divergence", "0.1", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert len(plan["curve"]) > 2
    assert plan["expected_divergence"] <= 0.1
    assert picture.read_text().startswith("<svg")
    _fails(["plan", NET, "--picture", str(picture)], "give --calibration FOLDER")
