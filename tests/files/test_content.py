"""A file's content is computed once, and never written where the network has other values by then."""

from __future__ import annotations

import copy
import functools
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.files import content as file_content
from bgd_plugin.files.format import file_bytes, stored
from tests.networks import SmallResNet, em, randomized


@functools.cache
def _quantized_once() -> nn.Module:
    model = randomized(SmallResNet())
    model.extra = torch.ones(3)
    return bgd.quantize_weights(model, em(em_iterations=2)).model


def _quantized() -> Any:
    """A network of which the length has been told."""
    net = copy.deepcopy(_quantized_once())
    assert file_content.measured_size(net) == len(file_bytes(stored(net)))
    return net


def _through_data(net: Any) -> None:
    net.fc.bias.data[0] += 1


def _through_numpy(net: Any) -> None:
    net.bn1.running_mean.numpy()[0] += 1


def _codes(net: Any) -> None:
    net.conv1.codes.data[0, 0] = (int(net.conv1.codes[0, 0]) + 1) % net.conv1.codebook_size


def _codebook(net: Any) -> None:
    net.conv2.codebook.data.mul_(2)


def _another_parameter(net: Any) -> None:
    net.stem.weight = nn.Parameter(net.stem.weight.detach() / 3)


def _one_tensor_under_two_names(net: Any) -> None:
    net.bn3.running_mean = net.bn2.running_mean


def _another_dtype(net: Any) -> None:
    net.double()


def _another_buffer(net: Any) -> None:
    net.register_buffer("counter", torch.zeros(2))


def _another_attribute(net: Any) -> None:
    net.extra = torch.zeros(3)


def _a_layer_in_float(net: Any) -> None:
    net.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)


CHANGES: list[Callable[[Any], None]] = [
    _through_data,
    _through_numpy,
    _codes,
    _codebook,
    _another_parameter,
    _one_tensor_under_two_names,
    _another_dtype,
    _another_buffer,
    _another_attribute,
    _a_layer_in_float,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_after_the_fit_is_what_is_written(change: Callable[[Any], None], tmp_path: Path) -> None:
    net = _quantized()
    before = file_bytes(stored(net))
    change(net)
    bgd.save(net, tmp_path / "net")
    written = (tmp_path / "net").read_bytes()
    assert written == file_bytes(stored(net))
    assert written != before


def test_an_unchanged_network_is_written_as_if_computed_anew(tmp_path: Path) -> None:
    net = _quantized()
    assert id(net) in file_content._known
    for name in ("first", "second"):
        bgd.save(net, tmp_path / name)
        assert (tmp_path / name).read_bytes() == file_bytes(stored(net))
    assert id(net) not in file_content._known  # nothing is kept once it is on disk


def test_a_copy_is_computed_by_itself(tmp_path: Path) -> None:
    net = _quantized()
    other = copy.deepcopy(net)
    other.fc.bias.data.zero_()
    bgd.save(other, tmp_path / "net")
    assert (tmp_path / "net").read_bytes() == file_bytes(stored(other))


def test_nothing_is_kept_of_a_network_that_is_gone() -> None:
    gc.collect()  # networks of earlier tests
    before = len(file_content._known)
    net = _quantized()
    assert len(file_content._known) == before + 1
    del net
    gc.collect()
    assert len(file_content._known) == before


def test_without_data_the_content_is_kept_too(tmp_path: Path) -> None:
    result = bgd.quantize_weights(randomized(SmallResNet()), em(em_iterations=2))
    assert id(result.model) in file_content._known
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes
    assert (tmp_path / "net").read_bytes() == file_bytes(stored(result.model))
