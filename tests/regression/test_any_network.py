"""Networks that do not trace, and layers that hide: they are quantized as any other, and behave as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig, LayerConfig
from bgd_plugin.nn import PQLinear, PQModule, PQWeight
from bgd_plugin.pq.blocks import from_transposed_matrix, transposed_matrix
from tests.networks import em, images, randomized, same_outputs, vectors

FINE = LayerConfig(block_size=1, codebook_size=256)


def _quantize(
    model: nn.Module, data: Any, config: bgd.BGDConfig | None = None, **options: Any
) -> bgd.results.Quantized:
    return bgd.quantize(model, data, config or em(), progress=False, **options)


class Detector(nn.Module):
    """What makes detectors hard: lists of images, a choice of regions, branches by mode, dicts as output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.late = nn.Linear(16, 16)  # held before what runs before it
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.score = nn.Conv2d(16, 4, 1)
        self.classes = nn.Linear(16, 5)

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        x = self.body(self.stem(torch.stack([image - image.mean() for image in images])))
        scores = self.score(x).amax(1).flatten(1)
        answers = []
        for features, score in zip(x.flatten(2), scores, strict=True):
            best = score.topk(6).indices
            kept = best[score[best] > score.mean()]
            logits = self.classes(torch.relu(self.late(features[:, kept].T)))
            answers.append({"logits": logits, "places": kept})
        if self.training:
            return {"loss": torch.cat([a["logits"] for a in answers]).square().mean()}
        return answers


def _detector() -> Any:
    return randomized(Detector())


def _lists(batches: int = 3) -> list[tuple[list[Tensor], None]]:
    return [(list(batch), None) for batch in images(batches)]


# --- networks that do not trace


@pytest.mark.parametrize("method", ["em", "full"])
def test_a_network_that_does_not_trace_keeps_its_class_names_and_behaviour(method: Any, tmp_path: Path) -> None:
    model = _detector()
    result = _quantize(model, _lists(), em(method=method, batchnorm="matched"))
    student: Any = result.model
    assert type(student) is Detector
    assert [x.name for x in result.report.layers] == ["body.0", "score", "late", "classes"]
    assert [(x.name, x.reason) for x in result.report.skipped] == [("stem", "first_layer=None")]
    kept = {name for name in model.state_dict() if name in student.state_dict()}
    assert kept | {"body.0.weight", "score.weight", "late.weight", "classes.weight"} == set(model.state_dict())
    assert "loss" in copy.deepcopy(student).train()(_lists()[0][0])
    bgd.save(student, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    loaded = bgd.load(tmp_path / "net", like=_detector())
    dense = bgd.materialize(student)
    assert type(dense.classes) is nn.Linear
    with torch.no_grad():
        for (batch, _), other in ((data, net) for data in _lists() for net in (loaded, dense)):
            for mine, theirs in zip(student(batch), other(batch), strict=True):
                assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_layers_are_fitted_on_the_inputs_of_the_quantized_ones_before_them() -> None:
    model = _detector()
    result = _quantize(model, _lists(), em(overrides=(("classes", None), ("late", None))))
    seen: list[Tensor] = []
    hook = result.model.score.register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(2).mT.flatten(0, 1))
    )
    with torch.no_grad():
        for batch, _ in _lists():
            result.model(batch)
    hook.remove()
    rows, weight = torch.cat(seen), model.score.weight.detach().flatten(1)
    lost = rows @ (weight - result.model.score.weight.detach().flatten(1)).T
    expected = float(lost.square().sum() / (rows @ weight.T).square().sum())
    assert {x.name: x.relative_error for x in result.report.layers}["score"] == pytest.approx(expected, rel=1e-4)


def test_batch_norms_are_matched_where_nothing_traces() -> None:
    model = _detector()
    norms = [_quantize(model, _lists(), em(batchnorm=mode)).model.body[1].running_var for mode in ("keep", "matched")]
    assert torch.equal(norms[0], model.body[1].running_var)
    assert not torch.equal(norms[1], model.body[1].running_var)


def test_the_student_looks_at_the_regions_that_the_float_network_chose() -> None:
    """With the coarsest codebooks the choice of regions differs, and yet inputs can be paired."""
    coarse = LayerConfig(block_size=1, codebook_size=2)
    config = em(method="full", batchnorm="matched", conv=coarse, pointwise_conv=coarse)
    model = _detector()
    result = _quantize(model, _lists(), config)
    places = [[a["places"].tolist() for a in net(batch)] for net in (model, result.model) for batch, _ in _lists()]
    assert places[:3] != places[3:]
    assert not any("another branch" in note for note in result.report.notes)


def test_training_runs_where_nothing_traces() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x = torch.relu(self.a(x))
            return {"logits": self.c(torch.relu(self.b(x)) if x.sum() > 0 else x)}

    config = em(distillation=DistillationConfig(steps=4, batch_size=8), finetuning=FinetuningConfig(steps=4))
    plain, trained = (_quantize(Branching(), vectors(), c).model for c in (em(), config))
    assert any(not torch.equal(x, y) for x, y in zip(plain.parameters(), trained.parameters(), strict=True))


def test_a_detector_is_finetuned_on_what_its_modules_give() -> None:
    coarse = LayerConfig(block_size=4, codebook_size=2)
    config = em(linear=coarse, pointwise_conv=coarse)
    model, losses = _detector(), []
    for steps in (1, 60):
        finetuning = FinetuningConfig(steps=steps, outputs=("body", "score", "classes"), learning_rate=0.03)
        notes = _quantize(model, _lists(), replace(config, finetuning=finetuning)).report.notes
        losses.append(float(notes[-1].rpartition(" → ")[2]))
    assert losses[1] < 0.8 * losses[0]


def test_outputs_that_match_no_module_are_an_error() -> None:
    config = em(finetuning=FinetuningConfig(steps=1, outputs=("bodies",)))
    with pytest.raises(bgd.errors.ConfigError, match="outputs: 'bodies' matches no module"):
        _quantize(_detector(), _lists(), config)


def test_a_layer_that_no_input_reaches_stays_float_with_the_reason(tmp_path: Path) -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.never, self.last = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.last(self.never(x) if x.mean() > 1e6 else x)

    model = Rare()
    result = _quantize(model, vectors())
    assert [x.name for x in result.report.layers] == ["last"]
    assert ("never", "no calibration input reaches it") in [(x.name, x.reason) for x in result.report.skipped]
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=model), vectors())


def test_mappings_go_in_and_out() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, **rest: Any) -> dict[str, Tensor]:
            if ids is None:
                raise ValueError("ids are needed")
            x = self.a(self.embed(ids))
            return {"states": self.b(x if mask is None or bool(mask.all()) else x * mask[..., None])}

    data = [{"ids": torch.randint(0, 20, (2, 7)), "mask": torch.ones(2, 7)} for _ in range(3)]
    model = Keyed().eval()
    result = _quantize(model, data, em(linear=FINE))
    assert [x.name for x in result.report.layers] == ["a", "b"]
    out, exact = (net(**data[0])["states"].detach() for net in (result.model, model))
    assert float((out - exact).norm() / exact.norm()) < 0.1


# --- layers that hide


class Attention(nn.Module):
    def __init__(self, kdim: int | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(12, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True, kdim=kdim, vdim=kdim)
        self.last = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        other = x if self.attention.kdim == 12 else y
        return self.last(self.attention(y, other, other, need_weights=False)[0])


def _sequences(batches: int = 3) -> list[Tensor]:
    return [v.reshape(2, 4, 12) for v in vectors(batches)]


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("kdim", [None, 12])
def test_projections_of_attention_are_quantized(kdim: int | None, method: Any, tmp_path: Path) -> None:
    model = Attention(kdim).eval()
    result = _quantize(model, _sequences(), em(method=method))
    names = ["attention.in_proj_weight"] if kdim is None else [f"attention.{x}_proj_weight" for x in "qkv"]
    assert [x.name for x in result.report.layers] == [*names, "attention.out_proj", "last"]
    assert all(0 < x.relative_error < 1 for x in result.report.layers)
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=Attention(kdim).eval()), _sequences())
    dense = bgd.materialize(result.model)
    assert isinstance(dense.attention._parameters[names[0].split(".")[1]], nn.Parameter)
    assert not any(isinstance(m, PQModule) for m in dense.modules())
    for batch in _sequences():  # torch multiplies in another order where a weight may want gradients
        torch.testing.assert_close(result.model(batch), dense(batch))


def test_attention_computes_with_the_decoded_projections() -> None:
    model = Attention().eval()
    student: Any = _quantize(model, _sequences()).model
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "last.weight"):
        owner = student.get_submodule(name.rpartition(".")[0])
        model.get_parameter(name).data = getattr(owner, name.rpartition(".")[2]).detach().clone()
    with torch.no_grad():
        for batch in _sequences():
            torch.testing.assert_close(student(batch), model(batch))


def test_the_error_of_a_hidden_projection_is_that_on_its_inputs() -> None:
    model = Attention().eval()
    result = _quantize(model, _sequences())
    with torch.no_grad():
        rows = torch.cat([model.first(x).flatten(0, 1) for x in _sequences()])
        lost = model.attention.in_proj_weight - result.model.attention.in_proj_weight
        expected = float((rows @ lost.T).square().sum() / (rows @ model.attention.in_proj_weight.T).square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-4)


def test_a_network_with_a_computed_parameter_is_copied_and_pickled(tmp_path: Path) -> None:
    student = _quantize(Attention().eval(), _sequences()).model.attention
    torch.save(student, tmp_path / "attention.pt")
    again = torch.load(tmp_path / "attention.pt", weights_only=False)
    x = torch.randn(2, 4, 16)
    with torch.no_grad():
        for other in (copy.deepcopy(student), again):
            assert torch.equal(student(x, x, x)[0], other(x, x, x)[0])


class _OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) if x.sum() > -1e9 else x


def test_a_subclass_with_a_forward_of_its_own_keeps_it() -> None:
    model = nn.Sequential(nn.Linear(12, 16), _OwnForward(16, 16))
    result = _quantize(model, vectors())
    assert isinstance(result.model[1], _OwnForward)
    assert isinstance(result.model[1]._modules["weight"], PQWeight)
    assert result.report.layers[0].relative_error > 0


# --- tied and computed weights


def _tied(branch: bool) -> Any:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 32)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.a(x))
            if branch and x.sum() < -1e9:
                return x
            return self.c(torch.tanh(self.b(x)))

    return Tied()


@pytest.mark.parametrize("branch", [False, True])
def test_tied_layers_stay_tied_and_are_stored_once(branch: bool, tmp_path: Path) -> None:
    model = _tied(branch)
    plan = bgd.plan(model, em())
    assert [(x.name, x.note.partition(";")[2].strip()) for x in plan.layers] == [("b", "tied to c")]
    result = _quantize(model, vectors())
    assert plan.compressed_bytes == result.report.compressed_bytes
    assert plan.paper_bytes == result.report.paper_bytes
    bgd.save(result.model, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=_tied(branch))
    for net in (result.model, loaded):
        assert isinstance(net.c, PQLinear)
        assert net.b.codebook is net.c.codebook
        assert net.b.codes.data_ptr() == net.c.codes.data_ptr()
        assert not torch.equal(net.b.bias, net.c.bias)
    assert same_outputs(result.model, loaded, vectors())
    dense = bgd.materialize(loaded)
    assert dense.b.weight is dense.c.weight
    assert same_outputs(result.model, dense, vectors())


def test_float_parameters_that_are_tied_stay_so_after_loading(tmp_path: Path) -> None:
    def network() -> Any:
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.LayerNorm(16))
        model[3].weight = model[2].weight
        return model

    result = _quantize(network(), vectors())
    bgd.save(result.model, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=network())
    assert loaded.get_submodule("2").weight is loaded.get_submodule("3").weight


@pytest.mark.parametrize(
    ("norm", "name"),
    [
        (parametrizations.weight_norm, "WeightNorm"),
        (parametrizations.spectral_norm, "SpectralNorm"),
        (nn.utils.spectral_norm, "SpectralNorm"),
    ],
)
def test_parametrized_weights_are_folded(norm: Callable[[nn.Module], Any], name: str, tmp_path: Path) -> None:
    def network() -> Any:
        return nn.Sequential(nn.Linear(12, 32), norm(nn.Linear(32, 32)), nn.ReLU(), nn.Linear(32, 32)).eval()

    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = _quantize(model, vectors(), em(linear=FINE, em_iterations=40))
    assert {x.name: x.note for x in result.report.layers}["1"].endswith(f"{name} folded into the weight")
    assert type(result.model.get_submodule("1")) is PQLinear
    exact, out = (torch.cat([net(x) for x in vectors()]).detach() for net in (model, result.model))
    assert float((out - exact).norm() / exact.norm()) < 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    bgd.save(result.model, tmp_path / "net")
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=network()), vectors())


# --- what else a network may come with


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["em", "full"])
def test_a_network_in_half_precision(dtype: torch.dtype, method: Any, tmp_path: Path) -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU())).to(dtype)
    data = [batch.to(dtype) for batch in images()]
    result = _quantize(model, data, em(method=method, batchnorm="matched"))
    student: Any = result.model
    assert student.get_submodule("1").codebook.dtype == dtype
    assert student(data[0]).dtype == dtype
    bgd.save(student, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    assert same_outputs(student, bgd.load(tmp_path / "net", like=model), data)


def test_hooks_stay_where_they_were() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 16))
    model[1].register_forward_hook(lambda module, args, output: output + 1000)
    assert float(_quantize(model, vectors()).model(vectors()[0]).detach().min()) > 500


def test_dropout_in_training_mode_does_not_touch_calibration() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.9), nn.Linear(16, 16))
    fitted = [_quantize(net, vectors()).model.get_submodule("2").codebook for net in (model.eval(), model.train())]
    assert torch.equal(*fitted)


# --- kinds of layers


def _up(kind: Any, dimensions: int, **fields: Any) -> tuple[nn.Module, list[Tensor]]:
    convs = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    model = nn.Sequential(convs[dimensions](3, 16, 1), nn.ReLU(), kind(16, 8, **fields))
    return model.eval(), [torch.randn(2, 3, *([5] * dimensions)) for _ in range(3)]


TRANSPOSED = [
    (nn.ConvTranspose1d, 1, {"kernel_size": 3, "stride": 2, "output_padding": 1}),
    (nn.ConvTranspose2d, 2, {"kernel_size": 2, "stride": 2}),
    (nn.ConvTranspose2d, 2, {"kernel_size": 3, "groups": 2, "padding": 1, "dilation": 2, "bias": False}),
    (nn.ConvTranspose3d, 3, {"kernel_size": (1, 2, 3), "stride": (1, 2, 2)}),
]


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize(("kind", "dimensions", "fields"), TRANSPOSED)
def test_transposed_convolutions(kind: Any, dimensions: int, fields: Any, method: Any, tmp_path: Path) -> None:
    model, data = _up(kind, dimensions, **fields)
    result = _quantize(model, data, em(method=method))
    (layer,) = result.report.layers
    assert (layer.kind, layer.block_size) == (f"conv_transpose{dimensions}d", 4)
    assert 0 < layer.relative_error < 1
    bgd.save(result.model, tmp_path / "net")
    assert (tmp_path / "net").stat().st_size == result.report.compressed_bytes
    assert bgd.plan(model, em()).compressed_bytes == result.report.compressed_bytes
    assert same_outputs(result.model, bgd.load(tmp_path / "net", like=model), data)
    dense: Any = bgd.materialize(result.model)
    assert type(dense.get_submodule("2")) is kind
    assert same_outputs(result.model, dense, data)


def test_the_error_of_a_transposed_convolution_without_overlap_is_that_of_its_output() -> None:
    model, data = _up(nn.ConvTranspose2d, 2, kernel_size=2, stride=2, bias=False)
    result = _quantize(model, data)
    with torch.no_grad():
        exact, out = (torch.cat([net(x) for x in data]) for net in (model, result.model))
    expected = float((exact - out).square().sum() / exact.square().sum())
    assert result.report.layers[0].relative_error == pytest.approx(expected, rel=1e-4)


def test_the_matrix_of_a_transposed_convolution_and_back() -> None:
    weight = torch.randn(6, 4, 2, 3)
    matrix = transposed_matrix(weight, 2)
    assert matrix.shape == (2 * 4 * 6, 3)
    assert torch.equal(matrix[4 * 6 + 2 * 6 + 1 * 3 + 2], weight[3:, 2, 1, 2])  # group 1, channel 2, offset (1, 2)
    assert torch.equal(from_transposed_matrix(matrix, weight.shape, 2), weight)


class Language(nn.Module):
    """An embedding whose weight the last layer may share."""

    def __init__(self, tied: bool, branch: bool) -> None:
        super().__init__()
        self.branch = branch
        self.embed, self.middle = nn.Embedding(40, 16, padding_idx=0), nn.Linear(16, 16)
        self.head = nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.middle(self.embed(ids)))
        if self.branch and x.sum() < -1e9:
            return x
        return self.head(x)


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_are_quantized_when_asked_for(tied: bool, branch: bool, method: Any, tmp_path: Path) -> None:
    model = Language(tied, branch).eval()
    data = [torch.randint(0, 40, (2, 9)) for _ in range(3)]
    skipped = {s.name: s.reason for s in bgd.plan(model, em()).skipped}
    assert skipped == ({"head": "embedding=None (tied to embed)"} if tied else {"embed": "embedding=None"})
    config = em(method=method, embedding=LayerConfig(block_size=4, codebook_size=32))
    result = _quantize(model, data, config)
    names = {"middle", "head"} if tied else {"embed", "middle", "head"}
    assert {x.name for x in result.report.layers} == names
    assert bgd.plan(model, config).compressed_bytes == result.report.compressed_bytes
    bgd.save(result.model, tmp_path / "net")
    loaded: Any = bgd.load(tmp_path / "net", like=Language(tied, branch).eval())
    assert (loaded.embed.codebook is loaded.head.codebook) is tied
    assert same_outputs(result.model, loaded, data)
    dense: Any = bgd.materialize(loaded)
    assert (dense.embed.weight is dense.head.weight) is tied
    assert same_outputs(result.model, dense, data)


def test_an_embedding_decodes_the_rows_of_its_weight() -> None:
    config = em(embedding=LayerConfig(block_size=4, codebook_size=32))
    embed: Any = _quantize(Language(False, False), [torch.randint(0, 40, (2, 9))], config).model.embed
    ids = torch.randint(0, 40, (3, 5))
    assert torch.equal(embed(ids), embed.weight[ids])
