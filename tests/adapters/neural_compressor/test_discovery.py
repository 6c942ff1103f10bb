"""The adapter is found by its name, and registers once."""

from __future__ import annotations

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

from neural_compressor.common.base_config import ComposableConfig
from neural_compressor.torch.utils.utility import algos_mapping

import bgd_plugin_adapters.neural_compressor as adapter


def test_registering_twice_does_no_more() -> None:
    before = ComposableConfig.to_config_mapping
    adapter.register()
    assert ComposableConfig.to_config_mapping is before
    assert list(algos_mapping).count("bgd") == 1
