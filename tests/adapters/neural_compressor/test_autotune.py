"""`autotune` on a trained network: it picks by the user's metric, and what it picked is the same in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

import neural_compressor.torch.quantization as inc
import torch
from torch import nn

from bgd_plugin.errors import CheckpointError
from bgd_plugin.nn import PQModule
from bgd_plugin_adapters.neural_compressor import BGDConfig, load
from tests.adapters.digits import DigitsResNet, accuracy, digits, trained_on_digits
from tests.adapters.neural_compressor.networks import feed, kinds

ROOT = Path(__file__).resolve().parents[3]
RUN = feed(list(digits()[0][:200].split(100)))
NEVER = -1.0  # a relative loss that no network stays below, so that all settings are tried


def _bytes(model: Any) -> int:
    report = getattr(model, "report", None)
    return report.compressed_bytes if report else sum(t.nbytes for t in model.state_dict().values())


def _worth(model: nn.Module) -> float:
    """Accuracy, less half of what the network takes of the float one's bytes."""
    return accuracy(model) - 0.5 * _bytes(model) / _bytes(trained_on_digits(DigitsResNet))


def _tuned(configs: list[Any], metric: Callable[[nn.Module], float]) -> tuple[Any, list[Any], list[float]]:
    """The network that is picked, the networks that were tried, and what each was worth; the float one is not among."""
    tried: list[Any] = []
    worth: list[float] = []

    def eval_fn(model: nn.Module) -> float:
        tried.append(model)
        worth.append(metric(model))
        return worth[-1]

    tuning = inc.TuningConfig(config_set=configs, tolerable_loss=NEVER)
    best = inc.autotune(trained_on_digits(DigitsResNet), tuning, eval_fn, run_fn=RUN)
    return best, tried[1:], worth[1:]


def _same_in_a_fresh_process(folder: Path, model: nn.Module, like: nn.Module, load_from: str) -> None:
    images = digits()[2]
    with torch.no_grad():
        torch.save({"x": images, "y": model(images), "like": like.state_dict()}, folder / "expected.pt")
    code = (
        "import sys, torch\n"
        f"from {load_from} import load\n"
        "from tests.adapters.digits import DigitsResNet\n"
        "expected = torch.load(sys.argv[1] + '/expected.pt', weights_only=True)\n"
        "like = DigitsResNet().eval()\n"
        "like.load_state_dict(expected['like'])\n"
        "net = load(sys.argv[1], like)\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(net(expected['x']), expected['y'])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}
    done = subprocess.run([sys.executable, "-c", code, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_setting_that_is_worth_most_is_picked_and_comes_back_in_a_fresh_process(tmp_path: Path) -> None:
    ours = BGDConfig(batchnorm=["matched", "keep"], method="em", codebook_size=[64, 256], max_divergence=None)
    best, tried, worth = _tuned([ours, inc.RTNConfig(bits=4)], _worth)
    assert len(worth) == len(set(worth)) == 5
    assert _worth(best) == max(worth)
    assert ["PQConv2d" in kinds(model).values() for model in tried] == [True] * 4 + [False]
    chosen = next(iter(best.qconfig.values()))
    # which setting wins depends on how the network trained on this machine; the settings kept are those of the winner
    assert max(m.codebook_size for m in best.modules() if isinstance(m, PQModule)) == chosen.codebook_size
    assert chosen.batchnorm == "matched"
    inc.save(best, str(tmp_path))
    _same_in_a_fresh_process(tmp_path, best, DigitsResNet(), "bgd_plugin_adapters.neural_compressor")


def test_where_rtn_is_worth_most_both_loads_read_what_it_saved(tmp_path: Path) -> None:
    ours = BGDConfig(batchnorm="keep", method="em", codebook_size=[2, 4], em_iterations=[1, 2], max_divergence=None)
    best, _, worth = _tuned([ours, inc.RTNConfig(bits=8)], accuracy)
    assert len(worth) == 5
    assert accuracy(best) == max(worth) == worth[-1]
    assert kinds(best)["fc"] == "INCWeightOnlyLinear"
    inc.save(best, str(tmp_path))
    dense = trained_on_digits(DigitsResNet)  # neural-compressor takes the layers that it did not quantize from it
    for module in ("neural_compressor.torch.quantization", "bgd_plugin_adapters.neural_compressor"):
        _same_in_a_fresh_process(tmp_path, best, dense, module)
    (tmp_path / "quantized_weight.pt").unlink()
    with pytest.raises(CheckpointError, match=r"quantized_weight\.pt.* missing"):
        load(str(tmp_path), DigitsResNet())
