"""The command `quantize`: files, reports, training, and runs that are stopped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from typer.main import get_command

import bgd_plugin as bgd
from bgd_plugin.calibration import DEFAULT_BOUND_BYTES
from bgd_plugin.cli.app import app
from tests.cli.common import NET, RUNNER, SMALL, fails


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


def test_codes_are_entropy_coded_on_demand(tmp_path: Path, flat: Path) -> None:
    output = tmp_path / "coded.safetensors"
    arguments = ["--calibration", str(flat), "--output", str(output), *SMALL, "--codes", "entropy"]
    done = RUNNER.invoke(app, ["quantize", NET, *arguments, "--target-size", "2000"])
    assert done.exit_code == 0, done.stderr
    with safe_open(output, "pt") as opened:
        assert opened.metadata()["bgd_plugin"] == '{"format":3}'


def test_the_command_holds_as_much_in_memory_as_the_function() -> None:
    (option,) = (one for one in get_command(app).commands["quantize"].params if one.name == "memory")  # type: ignore[attr-defined]
    assert option.default * 2**20 == DEFAULT_BOUND_BYTES


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
    fails([*arguments, "--resume"], "--resume: give --checkpoint FOLDER")
    fails([*arguments, "--resume", "--checkpoint", run], "contains no run: leave --resume out")
    assert RUNNER.invoke(app, [*arguments, "--checkpoint", run]).exit_code == 0
    assert RUNNER.invoke(app, [*arguments, "--checkpoint", run, "--resume"]).exit_code == 0
    assert (tmp_path / "a").read_bytes() == file.read_bytes()
    fails([*arguments, "--checkpoint", run, "--resume", "--seed", "3"], "another config (seed was 0, is 3)")


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
