"""Several processes agree with each other and with one alone; one that dies is named, and the rest goes on later."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin.nn import PQModule
from tests import distributed_job
from tests.distributed_job import CONFIGS, batches, network
from tests.forked import exit_codes, forked

# One worker of pytest-xdist runs them: the job of all settings runs once, and all processes are forked from one.
pytestmark = pytest.mark.xdist_group("processes")

WHOLE = [config for config in CONFIGS if config != "branching"]
END_SECONDS = 60  # within which the others must have ended


def _torchrun(output: Path, configs: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    output.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.distributed_job", "--output", str(output), "--configs", *configs, *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _forked(output: Path, configs: list[str], *arguments: str, processes: int = 2) -> list[Any]:
    """The processes of a job, started by hand."""
    output.mkdir(exist_ok=True)
    wanted = ["--output", str(output), "--configs", *configs, *arguments]
    return forked(distributed_job.main, wanted, processes=processes)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every setting."""
    output: Path = tmp_path_factory.mktemp("job")
    assert exit_codes(_forked(output, WHOLE, "--prelude")) == [0, 0]
    return output


def _alone(config: str, data: list[Tensor]) -> bgd.results.Quantized:
    return bgd.quantize(network(config), data, CONFIGS[config], progress=False)


def _loaded(job: Path, config: str) -> dict[str, PQModule]:
    net = bgd.load(job / f"{config}-0.safetensors", like=network(config))
    return {name: m for name, m in net.named_modules() if isinstance(m, PQModule)}


@pytest.mark.parametrize("config", WHOLE)
def test_all_processes_have_the_same_bytes(job: Path, config: str) -> None:
    first, second = ((job / f"{config}-{rank}.safetensors").read_bytes() for rank in (0, 1))
    assert first == second


@pytest.mark.parametrize("config", ["full", "em", "untraced"])
def test_two_processes_and_one_find_the_same_codes(job: Path, config: str) -> None:
    alone = _alone(config, batches(config))
    for name, layer in _loaded(job, config).items():
        other = alone.model.get_submodule(name)
        assert torch.equal(layer.codes, other.codes), name
        torch.testing.assert_close(layer.codebook, other.codebook, rtol=2e-3, atol=1e-6)  # both rounded to 16 bits


@pytest.mark.parametrize("config", ["full", "em"])
def test_two_processes_and_one_report_the_same_errors_and_gains(job: Path, config: str) -> None:
    """Each process has half of the data; errors and gains are those on all of it."""
    first, second = (json.loads((job / f"{config}-{rank}.json").read_text()) for rank in (0, 1))
    alone = json.loads(_alone(config, batches(config)).report.to_json())
    assert first["layers"] == second["layers"] and first["notes"] == second["notes"]
    numbers = re.compile(r"[\d.]+(?=%)")
    for one, other in zip(first["layers"], alone["layers"], strict=True):
        assert one["relative_error"] == pytest.approx(other["relative_error"], rel=0.02)
        assert (one["bias_gain"] or 0) == pytest.approx(other["bias_gain"] or 0, rel=0.1)
    for one, other in zip(first["notes"], alone["notes"], strict=True):
        assert numbers.sub("", one) == numbers.sub("", other)
        assert list(map(float, numbers.findall(one))) == pytest.approx(
            list(map(float, numbers.findall(other))), rel=0.1
        )


def test_two_processes_finetune_as_one_does_with_batches_of_twice_the_size(job: Path) -> None:
    data = batches("finetuned")
    joined = [torch.cat(data[i : i + 2]) for i in range(0, len(data), 2)]
    trained, start = _alone("finetuned", joined), dataclasses.replace(CONFIGS["finetuned"], finetuning=None)
    untrained = bgd.quantize(network("finetuned"), data, start, progress=False)
    for name, layer in _loaded(job, "finetuned").items():
        expected, before = trained.model.get_submodule(name).codebook, untrained.model.get_submodule(name).codebook
        moved = (expected - before).abs().max()
        assert (layer.codebook - expected).abs().max() < 0.05 * moved, name


@pytest.mark.parametrize("rank", [0, 1])
def test_different_networks_are_refused(job: Path, rank: int) -> None:
    said = (job / f"refused-{rank}").read_text()
    assert said.startswith("the processes of this job have different networks or settings")


def test_under_torchrun_a_killed_process_ends_the_job_and_the_next_one_goes_on(job: Path, tmp_path: Path) -> None:
    checkpoint = ["--checkpoint", str(tmp_path / "run")]
    run = _torchrun(tmp_path, ["trained"], *checkpoint, "--dies=1", "--walks=1", "--how=killed")
    assert run.returncode
    assert time.time() - (tmp_path / "end").stat().st_mtime < END_SECONDS
    assert "rank      : 1 (local_rank: 1)" in run.stderr.partition("Root Cause")[2]
    assert len(list((tmp_path / "run").glob("layer-*.safetensors"))) == 4
    assert not any(exit_codes(_forked(tmp_path, ["trained"], *checkpoint)))
    assert (tmp_path / "trained-1.safetensors").read_bytes() == (job / "trained-1.safetensors").read_bytes()


def _killed_while_it_trains(tmp_path: Path, processes: int) -> None:
    """Kill one process in the second epoch of three, and let another job go on from what was kept."""
    checkpoint = tmp_path / "run"
    # the data is walked once for calibration, and once for each of three epochs of finetuning
    common = ["--checkpoint", str(checkpoint), "--save-each-step", "--dies=1", "--walks=3", "--how=killed"]
    assert exit_codes(_forked(tmp_path, ["trained"], *common, processes=processes))[1] == -signal.SIGKILL
    assert (checkpoint / "finetuning.steps.safetensors").exists()
    # two epochs' walks are left
    assert not any(exit_codes(_forked(tmp_path, ["trained"], *common, processes=processes)))


def test_killed_while_it_trains_it_goes_on_at_the_step(job: Path, tmp_path: Path) -> None:
    _killed_while_it_trains(tmp_path, 2)
    for rank in range(2):
        name = f"trained-{rank}.safetensors"
        assert (tmp_path / name).read_bytes() == (job / name).read_bytes()


@pytest.mark.slow
def test_three_processes_killed_while_they_train_go_on_at_the_step(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assert not any(exit_codes(_forked(whole, ["trained"], processes=3)))
    _killed_while_it_trains(tmp_path, 3)
    for rank in range(3):
        name = f"trained-{rank}.safetensors"
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(("dies", "walks", "how"), [(1, 0, "killed"), (1, 0, "error"), (0, 1, "killed")])
def test_without_torchrun_the_others_end_and_name_it(dies: int, walks: int, how: str, tmp_path: Path) -> None:
    processes = _forked(tmp_path, ["trained"], f"--dies={dies}", f"--walks={walks}", f"--how={how}")
    try:
        processes[dies].join(200)
        assert processes[dies].exitcode
        processes[1 - dies].join(END_SECONDS)
        assert processes[1 - dies].exitcode == 1
        assert time.time() - (tmp_path / "end").stat().st_mtime < END_SECONDS
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = (tmp_path / f"error-{1 - dies}").read_text()
    assert f"process {dies}" in said
    assert how == "killed" or "OSError: the data is gone" in said


def test_processes_that_come_to_different_layers_are_told_so(tmp_path: Path) -> None:
    assert 1 in exit_codes(_forked(tmp_path / "out", ["branching"]))
    said = [file.read_text() for file in (tmp_path / "out").glob("error-*")]
    assert any("only some processes run rare" in text and "Use one process" in text for text in said)
