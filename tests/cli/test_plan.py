"""The command `plan`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bgd_plugin as bgd
from bgd_plugin.cli.app import app
from tests.cli.common import NET, RUNNER, fails


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


def test_norms_are_frozen_on_demand() -> None:
    sizes = []
    for more in ([], ["--freeze-norms"]):
        done = RUNNER.invoke(app, ["plan", "torchvision:resnet18", "--json", *more])
        sizes.append(json.loads(done.stdout)["compressed_bytes"])
    channels = 4800  # of resnet18's norms: mean and variance less, two bytes each
    assert 2 * 2 * channels <= sizes[0] - sizes[1] <= 2 * 2 * channels + 8192


def test_a_plan_takes_the_form_of_codes() -> None:
    asked = ["plan", "torchvision:resnet18", "--target-ratio", "20", "--json"]
    forms = [json.loads(RUNNER.invoke(app, [*asked, *more]).stdout) for more in ([], ["--codes", "entropy"])]
    sizes = [[layer["block_size"] for layer in plan["layers"]] for plan in forms]
    assert sizes[1].count(1) > sizes[0].count(1)


def test_trellis_codes_are_among_the_choices_on_demand() -> None:
    asked = ["plan", "torchvision:resnet18", "--target-ratio", "14", "--json"]
    forms = [json.loads(RUNNER.invoke(app, [*asked, *more]).stdout) for more in ([], ["--codes", "trellis"])]
    assert {layer["codes"] for layer in forms[0]["layers"]} == {"blocks"}
    assert "trellis" in {layer["codes"] for layer in forms[1]["layers"]}
    fails(["plan", NET, "--fixed-sizes", "--codes", "trellis"], "codes='trellis' lets a budget choose")


def test_entropy_coded_codes_with_fixed_sizes_are_an_error() -> None:
    fails(["plan", NET, "--fixed-sizes", "--codes", "entropy"], "codes='entropy' has no fixed sizes")


def test_plan_reads_the_weights_where_zeros_are_to_be_preserved(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(bgd.BGDConfig(preserve_zeros=True, max_divergence=None).to_json())
    done = RUNNER.invoke(
        app, ["plan", "tests.quantization.test_preserve_zeros:pruned", "--config", str(file), "--json"]
    )
    assert done.exit_code == 0, done.output
    assert {layer["name"]: layer["mask_form"] for layer in json.loads(done.stdout)["layers"]}["conv1"] == "2:4"


def test_plan_measures_the_curve_on_images(tmp_path: Path, flat: Path) -> None:
    picture = tmp_path / "curve.svg"
    images = ["--calibration", str(flat), "--size", "8", "--resize", "8"]
    done = RUNNER.invoke(app, ["plan", NET, *images, "--picture", str(picture), "--max-divergence", "0.1", "--json"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert len(plan["curve"]) > 2
    assert plan["expected_divergence"] <= 0.1
    assert picture.read_text().startswith("<svg")
    fails(["plan", NET, "--picture", str(picture)], "give --calibration FOLDER")
