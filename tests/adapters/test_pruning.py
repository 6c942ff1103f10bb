"""Pruning and quantization in every order: what makes sense works, what does not is refused with the reason."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager
from torch.nn.utils import prune

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.adapters import adapters
from bgd_plugin.errors import CheckpointError, ConfigError
from bgd_plugin_adapters.pruning import narrowed, register
from tests.networks import PlainNet, SmallResNet, em, images, randomized, same_outputs, vectors

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tp() -> Any:
    return pytest.importorskip("torch_pruning", reason="torch-pruning (extra pruning) is not installed")


@pytest.fixture(scope="module")
def rtn() -> Callable[[nn.Module], nn.Module]:
    """4-bit round-to-nearest of neural-compressor, which takes linear layers; on a copy."""
    quantization = pytest.importorskip(
        "neural_compressor.torch.quantization", reason="neural-compressor (extra neural-compressor) is not installed"
    )

    def apply(model: nn.Module) -> nn.Module:
        result: nn.Module = quantization.quantize(copy.deepcopy(model), quantization.RTNConfig(bits=4, group_size=16))
        return result

    return apply


def narrow(tp: Any, model: nn.Module, round_to: int | None = 8, classifier: str = "fc") -> nn.Module:
    """A copy without half of its channels, by torch-pruning."""
    result = copy.deepcopy(model)
    pruner = tp.pruner.BasePruner(
        result,
        images()[0],
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[result.get_submodule(classifier)],
        round_to=round_to,
    )
    pruner.step()
    return result


class Wide(SmallResNet):
    """With channels to spare, and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.conv1 = nn.Conv2d(24, 36, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(36)
        self.conv2 = nn.Conv2d(36, 36, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(36)
        self.down = nn.Conv2d(24, 36, 1, stride=2, bias=False)
        self.fc = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.relu(self.bn1(self.stem(x))))
        y = self.bn3(self.conv2(self.relu(self.bn2(self.conv1(x)))))
        y += self.down(x)
        return self.fc(self.relu(y).mean((2, 3)))


def test_torch_pruning_then_quantization_is_a_chain_with_one_ratio(tp: Any, tmp_path: Path) -> None:
    dense: Wide = randomized(Wide())
    pruned = narrow(tp, dense)
    dense_bytes = bgd.plan(dense).original_bytes
    result = bgd.quantize(pruned, images(), em(), teacher=dense, progress=False, original_bytes=dense_bytes)
    assert pruned.get_submodule("conv1").weight.shape[:2] == (16, 8)
    assert result.report.ratio == dense_bytes / bgd.save(result.model, tmp_path / "net.safetensors")
    assert dense_bytes > 2 * bgd.plan(pruned, em()).original_bytes


@pytest.mark.parametrize("round_to", [8, None])
def test_a_pruned_network_loads_into_the_dense_architecture_narrowed(
    tp: Any, round_to: int | None, tmp_path: Path
) -> None:
    dense, path = randomized(Wide()), tmp_path / "net.safetensors"
    settings = em(depthwise_conv=LayerConfig(block_size=9))
    result = bgd.quantize(narrow(tp, dense, round_to), images(), settings, progress=False)
    bgd.save(result.model, path)
    with pytest.raises(CheckpointError, match=r"layer 'conv1': weight .* in the file, \[36, 24, 3, 3\] in the network"):
        bgd.load(path, like=dense)
    like = narrowed(dense, path)
    assert all(parameter.is_meta for parameter in like.parameters())
    assert same_outputs(bgd.load(path, like=like), result.model, images())
    assert dense.conv1.weight.shape == (36, 24, 3, 3)
    again = bgd.materialize(bgd.load(path, like=narrowed(Wide().to("meta").eval(), path)))
    assert same_outputs(again, result.model, images())


def test_torchvision_networks_go_through_the_chain(tp: Any, tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    path = tmp_path / "net.safetensors"
    few = {"conv": LayerConfig(block_size=9, codebook_size=4), "linear": LayerConfig(block_size=4, codebook_size=4)}
    settings = em(em_iterations=1, pointwise_conv=LayerConfig(block_size=4, codebook_size=4), **few)
    for make, classifier in ((models.resnet18, "fc"), (models.mobilenet_v2, "classifier.1")):
        dense = make(num_classes=10).eval()
        batch = [torch.randn(1, 3, 32, 32)]
        result = bgd.quantize(narrow(tp, dense, classifier=classifier), batch, settings, progress=False)
        bgd.save(result.model, path)
        fresh = narrowed(make(num_classes=10).to("meta").eval(), path)
        assert same_outputs(bgd.load(path, like=fresh), result.model, batch)


def test_a_fresh_process_needs_no_torch_pruning_to_load(tp: Any, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    result = bgd.quantize(narrow(tp, randomized(Wide())), images(), em(), progress=False)
    bgd.save(result.model, path)
    program = (
        "import json, sys, torch; import bgd_plugin as bgd\n"
        "from bgd_plugin_adapters.pruning import narrowed; from tests.adapters.test_pruning import Wide\n"
        "from tests.networks import images\n"
        f"net = bgd.load({str(path)!r}, like=narrowed(Wide().eval(), {str(path)!r}))\n"
        "assert 'torch_pruning' not in sys.modules\n"
        "print(json.dumps(net(images()[0]).tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'adapters'}", "OMP_NUM_THREADS": "1", "BGD_KERNELS": "off"},
    )
    with torch.no_grad():
        assert torch.equal(torch.tensor(json.loads(done.stdout)), result.model(images()[0]))


def test_widths_that_blocks_do_not_divide_give_way_or_are_refused(tp: Any) -> None:
    """What `round_to=8` is for: without it a width may be any, and a block size that was asked for may not fit."""
    pruned = randomized(Wide())
    pruned.fc = nn.Linear(36, 5)
    pruned = narrow(tp, pruned, round_to=None)
    columns = pruned.get_submodule("down").weight.shape[1]
    assert columns % 8
    assert {layer.name for layer in bgd.plan(pruned, em()).layers} == {"conv1", "conv2", "down", "fc"}
    with pytest.raises(
        ConfigError, match=f"layer 'down': {columns} weights per row do not divide into blocks of 8; use"
    ):
        bgd.plan(pruned, em(pointwise_conv=LayerConfig(block_size=8)))


def test_channels_first_then_masks_then_quantization(tp: Any) -> None:
    pruned = narrow(tp, randomized(Wide()))
    for name in ("conv1", "conv2"):
        prune.random_unstructured(pruned.get_submodule(name), "weight", 0.5)
    mask = pruned.get_submodule("conv2").get_buffer("weight_mask")
    result = bgd.quantize(pruned, images(), BGDConfig(preserve_zeros=True, max_divergence=None), progress=False)
    decoded: Any = result.model.get_submodule("conv2").weight
    assert torch.equal(decoded != 0, mask != 0)


def test_torch_pruning_refuses_a_quantized_network(tp: Any) -> None:
    register()
    register()
    quantized = bgd.quantize(randomized(SmallResNet()), images(), em(), progress=False).model
    with pytest.raises(
        ConfigError, match=r"layer 'conv1' is quantized: .* prune the float network first, quantize last"
    ):
        narrow(tp, quantized)


def test_torch_pruning_refuses_masks(tp: Any) -> None:
    """Left alone, it would take channels from some layers and stop in the middle."""
    register()
    model = randomized(SmallResNet())
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    with pytest.raises(ConfigError, match=r"layer 'conv1' has a pruning mask: make it permanent with .*prune.remove"):
        tp.DependencyGraph().build_dependency(model, images()[0])
    prune.remove(model.conv1, "weight")
    assert narrow(tp, model).get_submodule("conv1").weight.shape[0] == 8
    sparsifier = WeightNormSparsifier()
    sparsifier.prepare(model, [{"tensor_fqn": "fc.weight"}])
    with pytest.raises(ConfigError, match=r"layer 'fc' is parametrized: squash its mask"):
        tp.DependencyGraph().build_dependency(model, images()[0])


def test_the_adapter_is_registered_by_its_name(tp: Any) -> None:
    if "pruning" not in {adapter.name for adapter in adapters()}:
        pytest.skip("bgd-plugin is not installed with this entry point here")
    assert bgd.load_adapter("pruning").__name__ == "bgd_plugin_adapters.pruning"
    assert tp.DependencyGraph.build_dependency.refuses_quantized


def _quantized(model: nn.Module | None = None) -> Any:
    return bgd.quantize(model or PlainNet().eval(), vectors(), em(), progress=False).model


@pytest.mark.parametrize("name", ["weight", "codebook"])
def test_nn_utils_prune_after_quantization_is_refused(name: str) -> None:
    layer = _quantized().get_submodule("2")
    with pytest.raises(ConfigError, match=r"PQLinear\(.*\) has codewords and codes, .* then quantize"):
        prune.l1_unstructured(layer, name, 0.5)


def test_a_weight_put_into_a_quantized_layer_is_refused() -> None:
    with pytest.raises(ConfigError, match="prune the float network first, then quantize"):
        _quantized().get_submodule("2").weight = nn.Parameter(torch.zeros(32, 32))


def test_a_sparsifier_after_quantization_is_refused_by_torch() -> None:
    with pytest.raises(ValueError, match="does not have a parameter, a buffer, or a parametrized element"):
        WeightNormSparsifier().prepare(_quantized(), [{"tensor_fqn": "2.weight"}])


def test_materialized_a_network_can_be_pruned_and_quantized_again(tp: Any) -> None:
    quantized = bgd.quantize(randomized(Wide()), images(), em(), progress=False).model
    pruned = narrow(tp, bgd.materialize(quantized))
    assert len(bgd.quantize(pruned, images(), em(), progress=False).report.layers) == 4


class _Magnitude(PassBase):
    """A pruning pass of someone else: half of the weights of one layer to zero, under a mask."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        prune.l1_unstructured(graph_module.get_submodule("2"), "weight", 0.5)
        return PassResult(graph_module, True)


def test_a_pruning_pass_and_ours_in_one_pass_manager() -> None:
    model = PlainNet().eval()
    ours = bgd.BGDPass(em(preserve_zeros=True), vectors(), progress=False)
    result = PassManager(passes=[_Magnitude(), ours])(fx.symbolic_trace(copy.deepcopy(model))).graph_module
    prune.l1_unstructured(model[2], "weight", 0.5)
    decoded: Any = result.get_submodule("2").weight
    assert torch.equal(decoded == 0, model[2].weight == 0)


def test_a_pruning_pass_after_ours_is_refused() -> None:
    ours = bgd.BGDPass(em(), vectors(), progress=False)
    with pytest.raises(Exception, match="running the '_Magnitude' pass after the following passes") as info:
        PassManager(passes=[ours, _Magnitude()])(fx.symbolic_trace(PlainNet().eval()))
    assert isinstance(info.value.__cause__, ConfigError)
    assert "prune the float network first, then quantize" in str(info.value.__cause__)


def test_two_to_four_of_torch_ao_keeps_exactly_its_mask(tmp_path: Path) -> None:
    model = PlainNet().eval()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    mask: Tensor = model[2].parametrizations.weight[0].mask
    result = bgd.quantize(model, vectors(), BGDConfig(preserve_zeros=True, max_divergence=None), progress=False)
    path = tmp_path / "net.safetensors"
    assert bgd.save(result.model, path) == result.report.compressed_bytes == path.stat().st_size
    loaded: Any = bgd.load(path, like=PlainNet().eval())
    assert torch.equal(loaded.get_submodule("2").weight != 0, mask != 0)
    planned = next(
        layer
        for layer in bgd.plan(model, BGDConfig(preserve_zeros=True, max_divergence=None)).layers
        if layer.name == "2"
    )
    assert (planned.mask_form, planned.mask_bytes) == ("2:4", 32 * 32 // 4 * 3 // 8)


def test_whole_channels_under_a_mask_take_next_to_nothing() -> None:
    model = PlainNet().eval()
    prune.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    plan = bgd.plan(model, BGDConfig(preserve_zeros=True, max_divergence=None))
    assert (plan.layers[0].mask_form, plan.layers[0].mask_bytes) == ("lines", (32 + 32) // 8)


def _mixed() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_neural_compressor_takes_the_linear_layers_before_or_after_us(
    rtn: Callable[[nn.Module], nn.Module], first: str, tmp_path: Path
) -> None:
    model = _mixed()
    prune.random_unstructured(model[2], "weight", 0.5)
    mask = model[2].get_buffer("weight_mask")
    prune.remove(model[2], "weight")
    settings = em(preserve_zeros=True, linear=None)
    if first == "ours":
        result = rtn(bgd.quantize(model, images(), settings, progress=False).model)
    else:
        ours = bgd.quantize(rtn(model), images(), settings, progress=False)
        reasons = {skipped.name: skipped.reason for skipped in ours.report.skipped}
        assert reasons["6"] == "INCWeightOnlyLinear is already quantized by another library"
        result = ours.model
    kinds = [type(result.get_submodule(name)).__name__ for name in ("2", "6", "8")]
    assert kinds == ["PQConv2d", "INCWeightOnlyLinear", "INCWeightOnlyLinear"]
    decoded: Any = result.get_submodule("2").weight
    assert torch.equal(decoded != 0, mask != 0)
    with torch.no_grad():
        error = (result(images()[0]) - model(images()[0])).norm() / model(images()[0]).norm()
    assert math.isfinite(error) and error < 0.5
    path = tmp_path / "net.safetensors"
    bgd.save(result, path)
    assert same_outputs(bgd.load(path, like=rtn(model)), result, images())


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (
            lambda: PlainNet(),
            r"'0' has a weight \[32, 12\] in the file, \[16, 12\] in the network: give the network that",
        ),
        (lambda: nn.Sequential(nn.Conv1d(12, 32, 1)), r"'0' has a weight \[32, 12\] in the file, \[32, 12, 1\] in the"),
    ],
)
def test_a_file_of_another_network_is_refused(network: Callable[[], nn.Module], message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    bgd.save(_quantized(), path)
    other = network()
    if isinstance(other, PlainNet):
        other[0] = nn.Linear(12, 16)
    with pytest.raises(CheckpointError, match=message):
        narrowed(other, path)
