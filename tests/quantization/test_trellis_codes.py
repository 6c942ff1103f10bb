"""Layers with trellis codes, from the settings to the file and back."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import kernels
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.files.inspection import inspected, inspection_text
from bgd_plugin.files.save import read_file
from bgd_plugin.nn import PQModule
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, images, randomized, same_outputs, vectors

pytestmark = pytest.mark.usefixtures("compiled_search")

TRELLIS = bgd.LayerConfig(codes="trellis")
ROOT = Path(bgd.__file__).parents[1]


def _config(**fields: Any) -> bgd.BGDConfig:
    kinds = dict.fromkeys(("conv", "pointwise_conv", "linear", "first_layer"), TRELLIS)
    return bgd.BGDConfig(max_divergence=None, **(kinds | fields))


class Embedded(nn.Module):
    """An embedding, a transposed convolution and a grouped one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 8)
        self.up = nn.ConvTranspose1d(8, 6, 3, groups=2)
        self.grouped = nn.Conv1d(6, 18, 3, groups=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.relu(self.up(self.table(x).mT)))


def _tokens() -> list[torch.Tensor]:
    return [torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(i)) for i in range(4)]


NETWORKS: dict[str, tuple[Any, list[torch.Tensor]]] = {
    "resnet": (SmallResNet, images(size=12)),
    "functional": (FunctionalNet, images(size=12)),
    "twice": (TwiceNet, vectors()),
    "embedded": (Embedded, _tokens()),
}


@pytest.mark.parametrize("method", ["full", "em"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_planned_quantized_saved_and_loaded(name: str, method: str, tmp_path: Path) -> None:
    kind, data = NETWORKS[name]
    model = randomized(kind()).eval()
    config = _config(method=method, embedding=TRELLIS)
    plan, result = bgd.plan(model, config), bgd.quantize(model, data, config, progress=False)
    length = bgd.save(result.model, tmp_path / "net")
    assert length == result.report.compressed_bytes == plan.compressed_bytes == (tmp_path / "net").stat().st_size
    assert plan.paper_bytes == result.report.paper_bytes
    assert plan.memory_bytes == result.report.memory_bytes
    layers = [module for module in result.model.modules() if isinstance(module, PQModule)]
    assert layers
    assert not any(layer.has_blocks for layer in layers)
    loaded = bgd.load(tmp_path / "net", like=kind())
    assert same_outputs(result.model, loaded.eval(), data)
    dense = bgd.materialize(loaded)
    assert not any(isinstance(module, PQModule) for module in dense.modules())
    torch.testing.assert_close(dense(data[0]), loaded(data[0]), rtol=1e-4, atol=1e-5)


def test_a_fresh_process_reads_the_same_bits(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(size=12)
    result = bgd.quantize(model, data, _config(), progress=False)
    bgd.save(result.model, tmp_path / "net")
    torch.save(data[0], tmp_path / "input")
    code = (
        "import torch, bgd_plugin as bgd; from bgd_plugin import kernels; from tests.networks import SmallResNet\n"
        "net = bgd.load('net', like=SmallResNet().eval())\n"
        "with kernels.disabled(): torch.save(net(torch.load('input')), 'output')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    with kernels.disabled():
        assert torch.equal(torch.load(tmp_path / "output"), result.model(data[0]))


def test_two_bits_and_a_scale_for_each_row_and_too_few_rows_stay_float(tmp_path: Path) -> None:
    model = PlainNet().eval()
    plan = bgd.plan(model, _config())
    assert [layer.compressed_bytes for layer in plan.layers] == [12 * 8 + 2 * 32, 32 * 8 + 2 * 32]
    assert [layer.memory_bytes for layer in plan.layers] == [12 * 8 + 4 * 32, 32 * 8 + 4 * 32]
    assert [(s.name, s.reason) for s in plan.skipped] == [
        ("4", "5 rows, too few for trellis codes, which need 16: blocks can take it")
    ]
    assert "trellis" in str(plan)
    result = bgd.quantize(model, vectors(), _config(), progress=False)
    assert [layer.looked_up_in for layer in result.report.layers] == ["trellis", "trellis"]
    assert str(result.report).count("trellis") == 3  # and once in the reason of the layer that stays float
    result.report.to_html(tmp_path / "page")
    assert (tmp_path / "page").read_text().count("trellis codes, error") == 2
    bgd.save(result.model, tmp_path / "net")
    found = inspected(tmp_path / "net")
    assert found["format"] == 4
    assert [layer["codes"] for layer in found["layers"]] == ["trellis", "trellis"]
    assert found["layers"][0]["bits_per_weight"] == 8 * (12 * 8 + 2 * 32) / (12 * 32)
    assert sum(found["parts_bytes"].values()) == found["file_bytes"]
    assert "trellis" in inspection_text(found)


def test_files_of_blocks_alone_are_what_they_were(tmp_path: Path) -> None:
    blocks = bgd.LayerConfig(block_size=4, codebook_size=4)
    result = bgd.quantize(PlainNet().eval(), vectors(), _config(linear=blocks, first_layer=None), progress=False)
    bgd.save(result.model, tmp_path / "net")
    assert read_file(tmp_path / "net")[1]["format"] == 2


def test_forms_may_be_mixed_also_in_a_compact_file(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(size=12)
    config = _config(linear=bgd.LayerConfig(block_size=2), target_bytes=5000, weight_storage="int5", conv=TRELLIS)
    config = bgd.BGDConfig.from_json(config.to_json())
    result = bgd.quantize(model, data, config, progress=False)
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes <= 5000
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=SmallResNet()).eval(), data)
    assert {m.form.name for m in result.model.modules() if isinstance(m, PQModule)} == {"trellis", "blocks"}


def test_zeros_are_preserved(tmp_path: Path) -> None:
    model = randomized(PlainNet()).eval()
    with torch.no_grad():
        model[2].weight[model[2].weight.abs() < 0.05] = 0
    result = bgd.quantize(model, vectors(), _config(preserve_zeros=True), progress=False)
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes
    weight = bgd.materialize(bgd.load(tmp_path / "net", like=PlainNet()))[2].weight
    assert not weight[model[2].weight == 0].any()
    assert (weight != 0).sum() > 100


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(size=12)
    results = [
        bgd.quantize(model, data, _config(), progress=False, checkpoint=folder)
        for folder in (None, tmp_path / "run", tmp_path / "run")
    ]
    for number, result in enumerate(results):
        bgd.save(result.model, tmp_path / f"net{number}")
    assert len({(tmp_path / f"net{number}").read_bytes() for number in range(3)}) == 1


def test_a_layer_of_another_form_is_not_taken_from_a_run(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(size=12)
    bgd.quantize(model, data, _config(), progress=False, checkpoint=tmp_path / "run")
    file = sorted((tmp_path / "run").glob("layer-*.safetensors"))[0]
    tensors = safetensors.torch.load_file(file)
    safetensors.torch.save_file(tensors | {"codebook": tensors["codebook"][:, None].clone()}, file)
    with pytest.raises(CheckpointError, match="damaged"):
        bgd.quantize(model, data, _config(), progress=False, checkpoint=tmp_path / "run")


def test_scales_learn() -> None:
    model, data = randomized(PlainNet()).eval(), vectors()
    training = bgd.FinetuningConfig(steps=4, learning_rate=0.05)
    plain = bgd.quantize(model, data, _config(), progress=False).model
    tuned = bgd.quantize(model, data, _config(finetuning=training), progress=False).model
    assert torch.equal(plain[0].codes, tuned[0].codes)
    assert not torch.equal(plain[0].codebook, tuned[0].codebook)
    assert torch.equal(tuned[0].codebook.half().float(), tuned[0].codebook)
    assert torch.equal(plain[0].codeword_uses(), torch.full((32,), 12.0))


def test_copies_and_pickles_keep_the_form() -> None:
    model = bgd.quantize(randomized(PlainNet()).eval(), vectors(), _config(), progress=False).model
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_outputs(model, other, vectors())
        assert "codes='trellis'" in str(other)


def test_weights_alone_can_be_quantized() -> None:
    result = bgd.quantize_weights(randomized(PlainNet()).eval(), _config())
    assert [layer.relative_error < 0.12 for layer in result.report.layers] == [True, True]


def test_sizes_beside_trellis_codes_are_refused() -> None:
    with pytest.raises(ConfigError, match="no blocks and no codebook"):
        bgd.LayerConfig(block_size=4, codes="trellis")
    with pytest.raises(ConfigError, match="give 'blocks' or 'trellis'"):
        bgd.LayerConfig(codes="windows")  # type: ignore[arg-type]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A file with trellis codes, in the layout whose header can be edited."""
    result = bgd.quantize(PlainNet().eval(), vectors(), _config(), progress=False)
    bgd.save(result.model, tmp_path / "net")
    return tmp_path / "net"


@pytest.mark.parametrize(
    "entry",
    [
        ["PQLinear", 1, 4096, [32, 12], "windows"],
        ["PQLinear", 1, 4096, [32, 12], "trellis", 1],
        ["PQLinear", 2, 4096, [32, 12], "trellis"],
        ["PQLinear", 1, 256, [32, 12], "trellis"],
        ["PQLinear", 1, 4096, [32, 12]],
        ["PQLinear", 1, 4096, [16, 12], "trellis"],
    ],
)
def test_damaged_entries_are_refused(saved: Path, entry: list[Any]) -> None:
    tensors, header = read_file(saved)
    _write(saved, tensors, header | {"layers": header["layers"] | {"0": entry}})
    with pytest.raises(CheckpointError):
        bgd.load(saved, like=PlainNet())


@pytest.mark.parametrize("name", ["0.codes", "0.codebook"])
def test_tensors_of_another_length_are_refused(saved: Path, name: str) -> None:
    tensors, header = read_file(saved)
    _write(saved, tensors | {name: tensors[name][:-1].clone()}, header)
    with pytest.raises(CheckpointError, match="0"):
        bgd.load(saved, like=PlainNet())


def test_a_scale_that_is_not_finite_is_refused(saved: Path) -> None:
    tensors, header = read_file(saved)
    tensors["0.codebook"][3] = torch.inf
    _write(saved, tensors, header)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        bgd.load(saved, like=PlainNet())


def _write(path: Path, tensors: Any, header: Any) -> None:
    safetensors.torch.save_file(tensors, path, {"bgd_plugin": json.dumps(header)})
