"""ONNX: the file answers in onnxruntime as the network does in torch, and holds what our own file holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.exporting.export import export
from bgd_plugin.files.format import stored
from bgd_plugin.nn import quantized
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, em, images, randomized, vectors

onnx: Any = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


class Words(nn.Module):
    """An embedding, and a head that is tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(40, 16)
        self.mix = nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(tokens))))


class Upwards(nn.Module):
    """A transposed convolution with groups, and one without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.up = nn.ConvTranspose2d(16, 8, 3, stride=2, groups=2)
        self.last = nn.ConvTranspose2d(8, 16, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.up(torch.relu(self.stem(x)))))


class Branching(nn.Module):
    """Does not trace: which way it goes depends on a shape that no tracer knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        assert len(x) > 0
        x = torch.tanh(self.first(x)).unsqueeze(1)
        return {"scores": self.last(self.attention(x, x, x, need_weights=False)[0]).squeeze(1)}


class Placed(nn.Module):
    """Adds positions from a buffer that is not saved, by indices in another, and a table that is a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.register_buffer("places", torch.arange(8).flip(0).repeat(16, 1)[0], persistent=False)
        self.register_buffer("positions", torch.randn(8, 32), persistent=False)
        self.table = torch.randn(32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        places = self.get_buffer("places")
        x = torch.tanh(self.first(x)) + self.get_buffer("positions")[places[: x.shape[0]]] + self.table
        return self.last(x)


def _tokens() -> list[Tensor]:
    return [torch.randint(40, (4, 7), generator=torch.Generator().manual_seed(i)) for i in range(2)]


def _pruned(network: nn.Module, pattern: Callable[[Tensor], Tensor]) -> nn.Module:
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and name != "stem.weight":
            parameter.data *= pattern(parameter.data)
    return network


def _two_of_four(weight: Tensor) -> Tensor:
    groups = weight.reshape(-1, 4)
    return torch.zeros_like(groups).scatter_(1, groups.abs().topk(2).indices, 1.0).reshape(weight.shape)


def _case(build: Callable[[], nn.Module], data: Callable[[], list[Tensor]], **settings: Any) -> tuple[Any, ...]:
    return build, data, settings


CASES = {
    "default settings": _case(SmallResNet, images),
    "float16 codebooks": _case(SmallResNet, images, codebook_storage="float16", weight_storage="float32"),
    "frozen norms": _case(SmallResNet, images, freeze_norms=True),
    "weights read by functions": _case(FunctionalNet, lambda: images(size=12)),
    "one layer twice": _case(TwiceNet, vectors),
    "embedding and tied head": _case(Words, _tokens, embedding=bgd.LayerConfig(block_size=4, codebook_size=16)),
    "transposed convolutions": _case(Upwards, images),
    "tensors in no state dict": _case(Placed, vectors),
    "no trace": _case(Branching, vectors),
    "2:4 zeros": _case(lambda: _pruned(SmallResNet(), _two_of_four), images, preserve_zeros=True),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_file_answers_as_the_network(case: tuple[Any, ...], tmp_path: Path) -> None:
    build, data, settings = case
    torch.manual_seed(0)
    batches = data()
    network = bgd.quantize(randomized(build()), batches, em(**settings), progress=False).model
    done = export(network, tmp_path / "net.onnx", batches[0])
    assert done.largest_difference is not None
    assert done.largest_difference < 1e-5
    assert done.is_folded
    assert done.size_bytes == (tmp_path / "net.onnx").stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    onnx.checker.check_model(onnx.load(str(done.path)), full_check=True)


@pytest.mark.parametrize("codebook_size", [16, 300])
def test_codes_lie_in_the_file_as_in_ours(codebook_size: int, tmp_path: Path) -> None:
    layer = nn.Linear(12, 175)
    codes = torch.randint(codebook_size, (175, 4))
    network = nn.Sequential(quantized(layer, torch.randn(codebook_size, 3), codes), nn.Tanh())
    done = export(network, tmp_path / "net.onnx", vectors()[0])
    assert done.is_folded
    assert done.largest_difference is not None
    assert done.largest_difference < 1e-5
    codes_there = next(t for t in onnx.load(str(done.path)).graph.initializer if t.name == "0.codes")
    packed = bytes(stored(network).tensors["0.codes"].numpy())
    assert codes_there.raw_data[: len(packed)] == packed
    assert len(codes_there.raw_data) - len(packed) < 16


def test_codes_that_are_coded_in_our_file_are_packed_here(tmp_path: Path) -> None:
    config = bgd.BGDConfig(codes="entropy", target_ratio=8)
    batches = [torch.randn(64, 64) for _ in range(4)]
    network = bgd.quantize(
        nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 512)).eval(), batches, config, progress=False
    ).model
    saved = bgd.save(network, tmp_path / "net.safetensors")
    done = export(network, tmp_path / "net.onnx", torch.randn(2, 64))
    assert done.file_bytes == saved < done.packed_bytes
    assert done.size_bytes < 1.05 * done.packed_bytes
    assert "entropy-coded" in str(done)
    assert done.largest_difference is not None
    assert done.largest_difference < 1e-5


def test_a_batch_of_any_size(tmp_path: Path) -> None:
    import onnxruntime

    data = images()
    network = bgd.quantize(randomized(SmallResNet()), data, em(), progress=False).model
    export(network, tmp_path / "net.onnx", data[0][:1], dynamic=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    for batch in (1, 3, 4):
        found = session.run(None, {session.get_inputs()[0].name: data[0][:batch].numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), network(data[0][:batch]), atol=1e-5)


def test_keyword_arguments(tmp_path: Path) -> None:
    network = bgd.quantize(Words(), _tokens(), em(), progress=False).model
    done = export(network, tmp_path / "net.onnx", {"tokens": _tokens()[0]}, dynamic=True)
    assert [value.name for value in onnx.load(str(done.path)).graph.input] == ["tokens"]


def test_what_load_gives_is_exported_to_the_same_bytes(tmp_path: Path) -> None:
    data = images()
    network = bgd.quantize(randomized(SmallResNet()), data, em(), progress=False).model
    bgd.save(network, tmp_path / "net.safetensors")
    again = bgd.load(tmp_path / "net.safetensors", like=SmallResNet().eval())
    for model, name in ((network, "one.onnx"), (again, "other.onnx")):
        export(model, tmp_path / name, data[0])
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()


def test_the_file_is_as_small_as_ours(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(12, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    settings = em(em_iterations=1, codebook_storage="int8", float_storage="float16")
    compressed = bgd.quantize(network, vectors(), settings, progress=False).model
    done = export(compressed, tmp_path / "net.onnx", vectors()[0])
    assert done.size_bytes <= 1.03 * done.packed_bytes
    assert "entropy-coded" not in str(done)
    assert not any(node.metadata_props for node in onnx.load(str(done.path)).graph.node)


def test_the_session_that_saves_memory_decodes_at_each_run(tmp_path: Path) -> None:
    import onnxruntime

    network = bgd.quantize(PlainNet(), vectors(), em(), progress=False).model
    done = export(network, tmp_path / "net.onnx", vectors()[0])
    counts = []
    for limit in (None, "64"):
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        if limit:
            options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", limit)
        session = onnxruntime.InferenceSession(str(done.path), options)
        nodes = onnx.load(str(tmp_path / "optimized.onnx")).graph.node
        counts.append(sum(node.op_type == "Gather" for node in nodes))
        found = session.run(None, {session.get_inputs()[0].name: vectors()[0].numpy()})[0]
        assert torch.allclose(torch.from_numpy(found), network(vectors()[0]), atol=1e-5)
    assert counts[0] == 0
    assert counts[1] > 0
