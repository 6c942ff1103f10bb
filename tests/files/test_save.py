"""Files: the same network comes back, bit by bit, and a file that is not whole or not fitting is told apart."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin.nn import PQModule
from tests.networks import (
    FunctionalNet,
    PlainNet,
    SmallResNet,
    TwiceNet,
    em,
    images,
    randomized,
    same_outputs,
    vectors,
)

ROOT = Path(__file__).resolve().parents[2]
NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "resnet": (SmallResNet, images(1)),
    "plain": (PlainNet, vectors(1)),
    "functional": (FunctionalNet, images(1, size=12)),
    "shared": (TwiceNet, vectors(1)),
}


def _quantized(kind: Callable[[], nn.Module], data: list[Tensor], **fields: Any) -> Any:
    return bgd.quantize(randomized(kind()), data, em(**fields), progress=False).model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small ResNet's file."""
    bgd.save(_quantized(SmallResNet, images(1)), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def _tampered(path: Path, edit: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The file with its tensors and header changed by `edit`."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["bgd_plugin"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    edit(tensors, header)
    safetensors.torch.save_file(tensors, str(path), {"bgd_plugin": json.dumps(header)})
    return path


# --- there and back


@pytest.mark.parametrize("network", NETWORKS)
def test_outputs_are_the_same_bits_after_loading(network: str, tmp_path: Path) -> None:
    kind, data = NETWORKS[network]
    model = _quantized(kind, data)
    bgd.save(model, tmp_path / "net")
    torch.manual_seed(99)  # `like` has other weights
    assert same_outputs(model, bgd.load(tmp_path / "net", like=kind().eval()), data)


def test_the_whole_state_is_the_same_after_loading(tmp_path: Path) -> None:
    model = _quantized(SmallResNet, images(2), batchnorm="matched")
    model.bn2.num_batches_tracked += 70_000
    bgd.save(model, tmp_path / "net")
    before, after = model.state_dict(), bgd.load(tmp_path / "net", like=SmallResNet()).state_dict()
    assert list(before) == list(after)
    for name, value in before.items():
        assert (after[name].dtype, torch.equal(after[name], value)) == (value.dtype, True), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_come_back_as_they_were(dtype: torch.dtype, tmp_path: Path) -> None:
    data = [batch.to(dtype) for batch in vectors(1)]
    model = bgd.quantize(PlainNet().to(dtype), data, em(), progress=False).model
    bgd.save(model, tmp_path / "net")
    assert same_outputs(model, bgd.load(tmp_path / "net", like=PlainNet().to(dtype)), data)


def test_a_new_process_gets_the_same_bits(tmp_path: Path) -> None:
    data = images(1)
    model = _quantized(SmallResNet, data, batchnorm="matched")
    bgd.save(model, tmp_path / "net")
    torch.save(data[0], tmp_path / "input")
    code = (
        "import sys, torch, bgd_plugin as bgd; from tests.networks import SmallResNet\n"
        "net = bgd.load('net', like=SmallResNet().eval())\n"
        "torch.save((net(torch.load('input')), net.state_dict()), 'output')"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, check=True)
    output, state = torch.load(tmp_path / "output")
    assert torch.equal(output, model(data[0]))
    assert torch.equal(state["bn2.running_mean"], model.bn2.running_mean)
    assert torch.equal(state["bn2.running_var"], model.bn2.running_var)


@pytest.mark.parametrize("network", NETWORKS)
def test_like_may_be_on_the_meta_device(network: str, tmp_path: Path) -> None:
    kind, data = NETWORKS[network]
    model = _quantized(kind, data)
    bgd.save(model, tmp_path / "net")
    with torch.device("meta"):
        like = kind().eval()
    assert same_outputs(model, bgd.load(tmp_path / "net", like=like), data)


def test_like_stays_as_it_was(saved: Path) -> None:
    like = SmallResNet()
    before = {name: value.clone() for name, value in like.state_dict().items()}
    loaded = bgd.load(saved, like=like)
    assert all(torch.equal(value, before[name]) for name, value in like.state_dict().items())
    assert type(like.fc) is nn.Linear
    assert like.bn1.training
    assert loaded.training


def test_a_loaded_network_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    bgd.save(bgd.load(saved, like=SmallResNet()), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model, files = randomized(SmallResNet()), []
    for name in ("a", "b"):
        torch.manual_seed(len(files))  # the global random state must not matter
        bgd.save(bgd.quantize(model, images(), em(seed=3), progress=False).model, tmp_path / name)
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]


def test_another_seed_gives_other_codes() -> None:
    model = randomized(SmallResNet())
    one, other = (bgd.quantize(model, images(), em(seed=seed), progress=False).model for seed in (0, 1))
    assert not torch.equal(one.conv2.codes, other.conv2.codes)


def test_gradient_flags_follow_like(saved: Path) -> None:
    like = SmallResNet()
    like.conv1.requires_grad_(False)
    loaded = bgd.load(saved, like=like)
    assert (loaded.conv1.codebook.requires_grad, loaded.conv2.codebook.requires_grad) == (False, True)


# --- materialize


@pytest.mark.parametrize("network", NETWORKS)
def test_a_materialized_network_has_ordinary_layers_and_the_same_outputs(network: str) -> None:
    kind, data = NETWORKS[network]
    model = _quantized(kind, data)
    dense = bgd.materialize(model)
    assert not any(isinstance(module, PQModule) for module in dense.modules())
    assert set(dict(dense.named_parameters())) == set(dict(kind().named_parameters()))
    assert same_outputs(model, dense, data)


def test_materializing_leaves_its_input_alone() -> None:
    model = _quantized(SmallResNet, images(1))
    before = str(model)
    dense = bgd.materialize(model)
    dense.conv1.weight.data.zero_()
    dense.bn1.running_mean.zero_()
    assert isinstance(model.conv1, PQModule)
    assert str(model) == before
    assert bool(model.bn1.running_mean.any())


def test_a_materialized_network_loads_into_the_original_class() -> None:
    data = images(1)
    model = _quantized(SmallResNet, data)
    plain = SmallResNet().eval()
    plain.load_state_dict(bgd.materialize(model).state_dict())
    assert same_outputs(model, plain, data)


# --- files that are not whole, not ours, or not fitting


def test_saving_a_float_network_says_what_to_save(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no product-quantized layer: save the .model that bgd_plugin.quantize returns"
    ):
        bgd.save(SmallResNet(), tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere: file not found"):
        bgd.load(tmp_path / "nowhere", like=SmallResNet())


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(
        CheckpointError, match=r"not a whole safetensors file .* it is truncated, damaged or of another format"
    ):
        bgd.load(saved, like=SmallResNet())


def test_a_foreign_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(SmallResNet().state_dict(), path)
    with pytest.raises(CheckpointError, match=r"net.pt: not a whole safetensors file"):
        bgd.load(path, like=SmallResNet())


def test_a_safetensors_file_of_someone_else(tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": torch.zeros(3)}, str(tmp_path / "net"))
    with pytest.raises(CheckpointError, match=r"a safetensors file, but not written by bgd_plugin.save"):
        bgd.load(tmp_path / "net", like=SmallResNet())


def test_a_file_of_a_newer_version(saved: Path) -> None:
    _tampered(saved, lambda tensors, header: header.update(format=999))
    with pytest.raises(
        CheckpointError, match="written in format 999, but this version reads up to 4: upgrade bgd-plugin"
    ):
        bgd.load(saved, like=SmallResNet())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": "1"}', '{"format": 1, "layers": []}', "[" * 100_000])
def test_a_damaged_header(saved: Path, text: str) -> None:
    safetensors.torch.save_file({"x": torch.zeros(3)}, str(saved), {"bgd_plugin": text})
    with pytest.raises(CheckpointError, match="damaged"):
        bgd.load(saved, like=SmallResNet())


def _code_out_of_range(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """A codebook of 9 of its 16 codewords: 4 bits can say more than it has."""
    tensors["conv1.codebook"] = tensors["conv1.codebook"][:9].contiguous()
    header["layers"]["conv1"][2] = 9
    tensors["conv1.codes"].fill_(255)


def _drop(name: str) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: tensors.__delitem__(name)


def _put(name: str, value: Tensor) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: tensors.update({name: value})


def _entry(position: int, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, header: header["layers"]["conv1"].__setitem__(position, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_code_out_of_range, "'conv1.codes': code 15 is out of range, the codebook has 9 codewords"),
        (_drop("bn1.running_mean"), "'bn1.running_mean' is missing from the file"),
        (_drop("conv1.codebook"), "layer 'conv1': its entry or its codebook is damaged or missing"),
        (_drop("conv1.codes"), "'conv1.codes' is missing from the file"),
        (_put("stray", torch.zeros(2)), "'stray' is in the file; the network has no such state"),
        (_put("fc.bias", torch.zeros(7)), "'fc.bias': float32 [7] in the file, float32 [5] in the network"),
        (
            _put("fc.bias", torch.zeros(5, dtype=torch.float64)),
            "'fc.bias': float64 [5] in the file, float32 [5] in the network",
        ),
        (
            _put("conv1.codes", torch.zeros(3, dtype=torch.uint8)),
            "'conv1.codes': 128 codes of 4 bits expected, found torch.uint8 [3]",
        ),
        (
            _put("conv1.codebook", torch.full((16, 9), float("nan")).half()),
            "'conv1.codebook': the codebook contains NaN",
        ),
        (_entry(1, 7), "layer 'conv1': its entry or its codebook is damaged or missing"),
        (_entry(1, "9"), "layer 'conv1': its entry or its codebook is damaged or missing"),
        (_entry(2, -16), "layer 'conv1': its entry or its codebook is damaged or missing"),
        (_entry(3, [16, 8, 9, 1]), "layer 'conv1': weight [16, 8, 9, 1] in the file, [16, 8, 3, 3] in the network"),
    ],
)
def test_a_tampered_file_says_what_does_not_fit(saved: Path, edit: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(message)):
        bgd.load(_tampered(saved, edit), like=SmallResNet())


def test_like_of_another_architecture_lists_every_mismatch_at_once(saved: Path) -> None:
    like = SmallResNet()
    like.conv1 = nn.Conv2d(8, 16, 5, padding=2, stride=2, bias=False)
    like.fc = nn.Linear(16, 7)
    with pytest.raises(CheckpointError) as info:
        bgd.load(saved, like=like)
    text = str(info.value)
    assert f"{saved} does not fit the network given as `like`:" in text
    assert "layer 'conv1': weight [16, 8, 3, 3] in the file, [16, 8, 5, 5] in the network" in text
    assert "layer 'fc': weight [5, 16] in the file, [7, 16] in the network" in text


def test_like_with_other_leftovers_lists_every_mismatch_at_once(saved: Path) -> None:
    like = SmallResNet()
    like.bn1 = nn.BatchNorm2d(8, affine=False)
    like.stem = nn.Conv2d(3, 8, 3, padding=1, bias=True)
    with pytest.raises(CheckpointError) as info:
        bgd.load(saved, like=like)
    for part in ("'stem.bias' is missing from the file", "'bn1.weight' is in the file", "'bn1.bias' is in the file"):
        assert part in str(info.value)


def test_like_of_a_wholly_different_network_names_the_layers(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="layer 'conv1' is in the file; the network has no such convolution"):
        bgd.load(saved, like=PlainNet())


# --- nothing is left half done


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_an_existing_file_stays_whole_if_saving_fails(saved: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()
    model = _quantized(SmallResNet, images(1), linear=LayerConfig(block_size=2))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(
            CheckpointError,
            match=r"net.safetensors cannot be written \(disk full; it takes [0-9,]+ bytes\): free space",
        ):
            bgd.save(model, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_saving_over_a_file_replaces_it(saved: Path) -> None:
    model = _quantized(SmallResNet, images(1), linear=LayerConfig(block_size=2))
    bgd.save(model, saved)
    assert same_outputs(model, bgd.load(saved, like=SmallResNet().eval()), images(1))
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
def test_a_file_has_the_permissions_that_any_new_file_has(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    assert saved.stat().st_mode == (tmp_path / "plain").stat().st_mode


class _Versioned(PlainNet):
    """Loads by its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *others: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_module_that_asks_for_its_version_is_loaded(tmp_path: Path) -> None:
    found = bgd.quantize(_Versioned().eval(), vectors(), em(), progress=False).model
    bgd.save(found, tmp_path / "net")
    assert same_outputs(found, bgd.load(tmp_path / "net", like=_Versioned().eval()), vectors())


@pytest.mark.parametrize(
    "call", [bgd.materialize, lambda net: bgd.save(net, "a.safetensors")], ids=["materialize", "save"]
)
def test_what_is_no_network_is_refused(call: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match="the network is a dict: give a torch"):
        call({"weight": torch.zeros(2)})
