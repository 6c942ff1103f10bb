"""Rotation as a step of quantize: the file, the report, and what settings do."""

from pathlib import Path

import pytest
import torch

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.nn import RotatedNorm
from tests.rotation.networks import Model, words


def config(**fields: object) -> bgd.BGDConfig:
    return bgd.BGDConfig(
        linear=bgd.LayerConfig(block_size=4, codebook_size=16), rotation=True, **fields, max_divergence=None
    )  # type: ignore[arg-type]


def result_of(model: Model, **fields: object) -> bgd.results.Quantized:  # type: ignore[name-defined]
    torch.manual_seed(2)
    return bgd.quantize(model, [words(8) for _ in range(4)], config(**fields), progress=False)


def built() -> Model:
    torch.manual_seed(0)
    return Model(shared_values=True).eval()


def test_the_file_gives_the_network_back(tmp_path: Path) -> None:
    result = result_of(built())
    assert any("rotation: a residual stream" in note for note in result.report.notes)
    assert isinstance(result.model.get_submodule("norm"), RotatedNorm)
    file = tmp_path / "net.safetensors"
    assert bgd.save(result.model, file) == result.report.compressed_bytes
    loaded = bgd.load(file, like=Model(shared_values=True)).eval()
    inputs = words()
    assert torch.equal(loaded(inputs), result.model(inputs))
    assert loaded.head.weight is not None
    with torch.device("meta"):
        empty = Model(shared_values=True)
    assert torch.equal(bgd.load(file, like=empty).eval()(inputs), result.model(inputs))
    dense = bgd.materialize(result.model)
    torch.testing.assert_close(dense(inputs), result.model(inputs))


def test_a_network_without_the_norm_is_refused(tmp_path: Path) -> None:
    result = result_of(built())
    bgd.save(result.model, tmp_path / "net.safetensors")
    other = Model(shared_values=True)
    other.norm = torch.nn.Identity()
    with pytest.raises(CheckpointError, match="'norm': a norm of 16 features with a matrix behind it"):
        bgd.load(tmp_path / "net.safetensors", like=other)


def test_settings() -> None:
    with pytest.raises(ConfigError, match="rotation='yes'"):
        bgd.BGDConfig(rotation="yes", max_divergence=None)  # type: ignore[arg-type]
    assert bgd.BGDConfig.paper("small").rotation is False
    off = bgd.quantize(
        built(),
        [words(8)],
        bgd.BGDConfig(linear=config().linear, rotation=False, kept_aside=0, max_divergence=None),
        progress=False,
    )
    assert not any("rotation" in note for note in off.report.notes)
    assert not isinstance(off.model.get_submodule("norm"), RotatedNorm)


def test_auto_spares_zeros_and_the_papers_method() -> None:
    model = built()
    with torch.no_grad():
        model.blocks[0].q.weight[0, 0] = 0  # type: ignore[union-attr, index]
    for fields in ({"preserve_zeros": True}, {"method": "em"}):
        chosen = bgd.BGDConfig(linear=config().linear, rotation="auto", kept_aside=0, **fields, max_divergence=None)  # type: ignore[arg-type]
        result = bgd.quantize(model, [words(8)], chosen, progress=False)
        assert not isinstance(result.model.get_submodule("norm"), RotatedNorm)
