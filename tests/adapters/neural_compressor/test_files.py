"""Saved folders: the same bits in a fresh process, and every way a folder can be wrong."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("neural_compressor.torch.quantization", reason="neural-compressor is not installed")

import neural_compressor.torch.quantization as inc
import torch

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin_adapters.neural_compressor import BGDConfig, QuantizedModel, load
from tests.adapters.neural_compressor.networks import IMAGES, conv_net, feed, linears

ROOT = Path(__file__).resolve().parents[3]
FILES = ("bgd.json", "bgd.safetensors", "qconfig.json", "quantized_weight.pt")


def _model() -> Any:
    config = BGDConfig(seed=3, max_divergence=None).set_local("fc2", BGDConfig(dtype="fp32"))
    return inc.quantize(conv_net(), config, run_fn=feed(IMAGES))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    inc.save(_model(), str(folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_the_files(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == sorted(FILES)
    expected = _model().report.compressed_bytes
    assert (saved / "bgd.safetensors").stat().st_size == expected
    assert torch.load(saved / "quantized_weight.pt", weights_only=True) == {}
    entry = json.loads((saved / "qconfig.json").read_text())["('conv', 'Conv2d')"]
    assert entry["bgd"]["seed"] == 3


def test_loading_gives_the_same_network(saved: Path) -> None:
    model, net = _model(), load(str(saved), conv_net())
    assert isinstance(net, QuantizedModel)
    assert torch.equal(net(IMAGES[0]), model(IMAGES[0]))
    assert net.qconfig == model.qconfig


def test_a_loaded_network_is_saved_again(saved: Path, tmp_path: Path) -> None:
    inc.save(load(str(saved), conv_net()), str(tmp_path))
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (saved / name).read_bytes()


def test_a_fresh_process_gives_the_same_bits(saved: Path, tmp_path: Path) -> None:
    torch.save({"x": IMAGES[0], "y": _model()(IMAGES[0])}, tmp_path / "expected.pt")
    code = (
        "import sys, torch\n"
        "from bgd_plugin_adapters.neural_compressor import load\n"
        "from tests.adapters.neural_compressor.networks import conv_net\n"
        "expected = torch.load(sys.argv[2], weights_only=True)\n"
        "assert torch.equal(load(sys.argv[1], conv_net())(expected['x']), expected['y'])\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters")])}
    arguments = [sys.executable, "-c", code, str(saved), str(tmp_path / "expected.pt")]
    subprocess.run(arguments, env=environment, check=True, capture_output=True)


def test_the_network_file_is_one_of_the_core(saved: Path) -> None:
    net = bgd.load(saved / "bgd.safetensors", like=conv_net())
    assert torch.equal(net(IMAGES[0]), _model()(IMAGES[0]))


def test_the_frameworks_own_load_says_which_load_to_use(saved: Path) -> None:
    with pytest.raises(ConfigError, match=r"is read by bgd_plugin_adapters\.neural_compressor\.load"):
        inc.load(str(saved), conv_net())


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} missing"):
        load(str(folder), conv_net())


@pytest.mark.parametrize("name", FILES[1:])
def test_an_edited_file(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was changed since it was saved"):
        load(str(folder), conv_net())


def _forged(folder: Path, name: str, content: bytes) -> None:
    """Another content, of which the manifest knows."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "bgd.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "bgd.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", r"qconfig\.json is damaged"),
        ('{"layer": 3}', r"qconfig\.json is damaged"),
        ('{"print(1)": {"bgd": {}}}', r"qconfig\.json is damaged"),
        ('{"(\'fc1\', \'Linear\')": {"bgd": {"block_size": -1}}}', r"qconfig\.json is damaged \(block_size=-1"),
        (
            "{\"('fc1', 'Linear')\": {\"nobody\": {}}}",
            "quantized by 'nobody', an algorithm that this neural-compressor lacks",
        ),
    ],
)
def test_a_forged_config(folder: Path, content: str, message: str) -> None:
    _forged(folder, "qconfig.json", content.encode())
    with pytest.raises(CheckpointError, match=message):
        load(str(folder), conv_net())


def test_forged_weights_of_their_layers(tmp_path: Path) -> None:
    both = inc.RTNConfig(white_list=["fc1"]) + BGDConfig(white_list=["conv"], max_divergence=None)
    inc.save(inc.quantize(conv_net(), both, run_fn=feed(IMAGES)), str(tmp_path))
    _forged(tmp_path, "quantized_weight.pt", b"not a file of torch")
    with pytest.raises(CheckpointError, match="neural-compressor cannot load its layers"):
        load(str(tmp_path), conv_net())


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "files": 3}'])
def test_a_damaged_manifest(folder: Path, content: str) -> None:
    (folder / "bgd.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"bgd\.json is damaged"):
        load(str(folder), conv_net())


def test_a_folder_of_a_newer_library(folder: Path) -> None:
    (folder / "bgd.json").write_text(json.dumps({"format": 99, "files": {}}))
    with pytest.raises(CheckpointError, match="upgrade bgd-plugin"):
        load(str(folder), conv_net())


def test_another_network(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        load(str(saved), linears())


def test_the_arguments_are_those_of_neural_compressors_load(saved: Path) -> None:
    expected = _model()(IMAGES[0])
    for one in (
        load(model_name_or_path=str(saved), original_model=conv_net()),
        load(str(saved), original_model=conv_net(), format="default", device="cpu"),
        load(checkpoint_dir=str(saved), original_model=conv_net()),
    ):
        assert torch.equal(one(IMAGES[0]), expected)
    with pytest.raises(ConfigError, match="give the folder"):
        load(original_model=conv_net())
    with pytest.raises(ConfigError, match="give original_model"):
        load(str(saved))


def test_the_format_of_hugging_face_is_refused_for_ours(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="saved in the format 'default'"):
        load(str(saved), format="huggingface")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "bgd"}}')
    with pytest.raises(ConfigError, match=r"load_adapter\('transformers'\)"):
        load(str(tmp_path), format="huggingface")


@pytest.mark.parametrize("is_traced", [False, True])
def test_pickled_with_its_state(is_traced: bool) -> None:
    net: Any = torch.fx.symbolic_trace(conv_net()) if is_traced else conv_net()
    model = inc.quantize(net, BGDConfig(seed=3, max_divergence=None), run_fn=feed(IMAGES))
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again, QuantizedModel)
    assert torch.equal(again(IMAGES[0]), model(IMAGES[0]))
    assert again.qconfig == model.qconfig
    assert again.report == model.report
    third = pickle.loads(pickle.dumps(again))
    assert torch.equal(third(IMAGES[0]), model(IMAGES[0]))


def test_no_folder_and_another_format(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing; a saved folder holds"):
        load(str(tmp_path / "nothing"), conv_net())
    with pytest.raises(ConfigError, match="saved in the format 'default'"):
        _model().save(str(tmp_path), format="huggingface")
