"""One, two or more threads: the same bytes where that is asked for, and torch is left as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bgd_plugin as bgd
from tests.networks import SmallResNet, images, randomized


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["full", "em"])
def test_one_and_two_threads_give_the_same_bytes(method: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomized(SmallResNet())
    config = bgd.BGDConfig(
        method=method,
        distillation=bgd.DistillationConfig(steps=2, batch_size=8),
        finetuning=bgd.FinetuningConfig(epochs=1),
        max_divergence=None,
    )
    data = images(3, size=40, batch=16)  # large enough that sums are split among threads
    written = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = bgd.quantize(model, data, config, reproducible=True, progress=False)
        assert torch.get_num_threads() == threads
        assert not torch.are_deterministic_algorithms_enabled()
        bgd.save(result.model, tmp_path / "net.safetensors")
        written.add((tmp_path / "net.safetensors").read_bytes())
    assert len(written) == 1


def test_torch_is_left_as_it_was_after_an_error() -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with pytest.raises(bgd.errors.CalibrationError):
            bgd.quantize(SmallResNet(), [], bgd.BGDConfig(max_divergence=None), reproducible=True, progress=False)
        assert torch.get_num_threads() == 2
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
