"""Pruning masks become part of the weights, in a copy: the caller's network keeps its masks, hooks and values."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.ao.pruning import FakeSparsity, WeightNormSparsifier
from torch.nn.utils import parametrizations, parametrize, prune

import bgd_plugin as bgd
from bgd_plugin.graph import baked
from tests.networks import PlainNet, SmallResNet, em, images, randomized, same_outputs, vectors


def _masked() -> SmallResNet:
    """A network under masks of several kinds: two on one weight, whole rows, a bias."""
    model: SmallResNet = randomized(SmallResNet())
    prune.l1_unstructured(model.conv1, "weight", 0.5)
    prune.random_unstructured(model.conv1, "weight", 0.2)
    prune.ln_structured(model.conv2, "weight", 0.5, n=2, dim=0)
    prune.l1_unstructured(model.fc, "bias", 2)
    return model


def _made_plain(model: SmallResNet) -> SmallResNet:
    for module, name in ((model.conv1, "weight"), (model.conv2, "weight"), (model.fc, "bias")):
        prune.remove(module, name)
    return model


def _sparsified() -> tuple[PlainNet, WeightNormSparsifier]:
    """A network whose middle weight a sparsifier has under a 2:4 mask."""
    model = PlainNet().eval()
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": "2.weight"}])
    sparsifier.step()
    return model, sparsifier


def test_without_a_mask_it_is_the_network_itself() -> None:
    model = SmallResNet()
    assert baked(model) is model


def test_masks_of_nn_utils_prune_are_baked_in_a_copy() -> None:
    model = _masked()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = baked(model)
    assert same_outputs(result, model, images())
    assert {name for name, _ in result.named_parameters()} == {name for name, _ in SmallResNet().named_parameters()}
    assert not any(module._forward_pre_hooks for module in result.modules())
    assert result.get_parameter("conv1.weight").requires_grad
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert prune.is_pruned(model)
    _made_plain(model)  # the mask can still be made permanent: nothing of it was taken away
    assert same_outputs(result, model, images())


def test_the_copy_shares_what_is_not_masked() -> None:
    model = _masked()
    assert baked(model).get_parameter("stem.weight") is model.stem.weight


def test_a_masked_network_cannot_be_copied_by_deepcopy() -> None:
    """The reason why masks are baked first; the copy is of no use to a user who meets this error."""
    model = _masked()
    model(images()[0])
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(model)


def test_a_sparsifier_of_torch_ao_is_baked_in_a_copy() -> None:
    model, sparsifier = _sparsified()
    original = model[2].parametrizations.weight.original
    result = baked(model)
    assert type(result.get_submodule("2")) is nn.Linear
    assert same_outputs(result, model, vectors())
    assert float((result.get_parameter("2.weight") == 0).double().mean()) == 0.5
    assert parametrize.is_parametrized(model[2])
    assert bool((original != 0).all())
    sparsifier.squash_mask()
    assert torch.equal(model[2].weight, result.get_parameter("2.weight"))


def test_a_weight_that_something_else_computes_is_not_a_masks_and_is_folded_later() -> None:
    model = PlainNet().eval()
    parametrizations.weight_norm(model[2])
    assert baked(model) is model
    notes = {layer.name: layer.note for layer in bgd.plan(model, em()).layers}
    assert "WeightNorm folded into the weight" in notes["2"]


def test_a_module_of_which_another_weight_is_parametrized_stays_too() -> None:
    class _Two(nn.Linear):
        def __init__(self) -> None:
            super().__init__(12, 32)
            self.other = nn.Parameter(torch.ones(32, 12))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x @ self.other.T

    module = _Two()
    parametrize.register_parametrization(module, "weight", FakeSparsity(torch.ones(32, 12)))
    parametrizations.weight_norm(module, "other")
    model = nn.Sequential(module)
    assert baked(model) is model


def test_quantizing_a_masked_network_gives_what_baking_by_hand_gives() -> None:
    model = _masked()
    result = bgd.quantize(model, images(), em(), progress=False)
    assert prune.is_pruned(model)
    by_hand = bgd.quantize(_made_plain(model), images(), em(), progress=False)
    assert same_outputs(result.model, by_hand.model, images())
    assert result.report.original_bytes == by_hand.report.original_bytes
    assert {layer.name for layer in result.report.layers} == {"conv1", "conv2", "down", "fc"}


def test_quantizing_under_a_sparsifier_gives_what_squashing_its_mask_gives() -> None:
    model, sparsifier = _sparsified()
    result = bgd.quantize(model, vectors(), em(), progress=False)
    sparsifier.squash_mask()
    by_hand = bgd.quantize(model, vectors(), em(), progress=False)
    assert same_outputs(result.model, by_hand.model, vectors())


def test_a_masked_network_is_a_like_as_good_as_a_plain_one(tmp_path: object) -> None:
    model = _masked()
    result = bgd.quantize(model, images(), em(), progress=False)
    bgd.save(result.model, f"{tmp_path}/net.safetensors")
    for like in (model, SmallResNet().eval()):
        assert same_outputs(bgd.load(f"{tmp_path}/net.safetensors", like=like), result.model, images())


def test_a_masked_teacher_is_taken() -> None:
    model = _masked()
    settings = em(finetuning=bgd.FinetuningConfig(steps=1))
    result = bgd.quantize(model, images(), settings, teacher=_masked(), progress=False)
    assert len(result.report.layers) == 4


def test_a_frozen_weight_under_a_mask_stays_frozen() -> None:
    model = _masked()
    model.conv1.weight_orig.requires_grad_(False)
    result = bgd.quantize(model, images(), em(), progress=False)
    layer: nn.Module = result.model.get_submodule("conv1")
    assert not layer.get_parameter("codebook").requires_grad
    assert result.model.get_submodule("conv2").get_parameter("codebook").requires_grad


@pytest.mark.parametrize("name", ["weight_hh_l0", "bias_ih_l0"])
def test_masks_on_recurrent_weights_are_baked(name: str) -> None:
    """Such a module keeps a list of its weights beside their names."""
    model = nn.LSTM(8, 16, batch_first=True).eval()
    prune.l1_unstructured(model, name, 0.5)
    sequence = torch.randn(2, 5, 8)
    result = baked(model)
    assert torch.equal(result(sequence)[0], model(sequence)[0])
    assert bool((result.get_parameter(name) == 0).any())


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_a_sparse_tensor_is_refused(layout: torch.layout) -> None:
    model = PlainNet().eval()
    model[2].weight = nn.Parameter(torch.eye(32).to_sparse(layout=layout), requires_grad=False)
    message = rf"'2.weight' is a sparse tensor \({layout}\): make it dense with to_dense\(\); preserve_zeros=True"
    with pytest.raises(bgd.errors.ConfigError, match=message):
        bgd.plan(model)
    with pytest.raises(bgd.errors.ConfigError, match=message):
        bgd.quantize(model, vectors(), em(), progress=False)
