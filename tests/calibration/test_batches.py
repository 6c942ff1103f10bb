"""The user's batches as call arguments, and the logits out of what a network returns."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import Batch, Batches, collect_batches, logits_of, require_rewalkable
from bgd_plugin.calibration import batches as batches_module
from bgd_plugin.calibration.batches import given_number, iterate_batches
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import trace
from tests.networks import PlainNet, vectors

X = torch.ones(2, 12)


def _collect(calibration: Any, forward: Any = None) -> list[Batch]:
    return collect_batches(calibration, PlainNet(), device=torch.device("cpu"), forward=forward)


@pytest.mark.parametrize(
    ("item", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, torch.zeros(2)), (X,), {}),
        ([X, "a label"], (X,), {}),
        ({"x": X, "flag": True}, (), {"x": X, "flag": True}),
    ],
)
def test_the_plain_forms_of_a_batch(item: Any, args: Any, kwargs: Any) -> None:
    (batch,) = _collect([item])
    assert len(batch.args) == len(args)
    assert all(mine is theirs for mine, theirs in zip(batch.args, args, strict=True))
    assert batch.kwargs == kwargs
    assert batch.size == 2


@pytest.mark.parametrize("item", ["text", 3, {}, [], ["text"], {1: X}, None])
def test_a_batch_of_another_form_says_which_forms_there_are(item: Any) -> None:
    expected = (
        f"calibration batch 1 is a {type(item).__name__}: give a tensor, a sequence whose first item is the input"
    )
    with pytest.raises(CalibrationError, match=expected):
        _collect([X, item])


@pytest.mark.parametrize("calibration", [X, "text", {"x": X}, 3])
def test_one_batch_instead_of_batches_says_how_to_wrap_it(calibration: Any) -> None:
    expected = f"calibration is a {type(calibration).__name__}: give an iterable of batches, for one batch [batch]"
    with pytest.raises(CalibrationError, match=re.escape(expected)):
        _collect(calibration)


def test_no_batch_at_all() -> None:
    with pytest.raises(CalibrationError, match="the calibration data is empty: give an iterable of batches"):
        _collect([])


def test_an_iterator_that_was_walked_before() -> None:
    iterator = iter([X])
    next(iterator)
    with pytest.raises(CalibrationError, match="an iterator that is already used up is empty too"):
        _collect(iterator)


def test_a_batch_without_samples() -> None:
    with pytest.raises(CalibrationError, match="calibration batch 1 contains no samples"):
        _collect([X, X[:0]])


def test_an_iterator_is_refused_where_the_data_is_walked_twice() -> None:
    with pytest.raises(CalibrationError, match="a list_iterator, which can be iterated over only once, but finetuning"):
        require_rewalkable(iter([X]), "finetuning")
    require_rewalkable([X], "finetuning")


def test_forward_gives_the_arguments_it_calls_with() -> None:
    (batch,) = _collect([X], lambda model, item: model(item, scale=2))
    assert batch.args[0] is X
    assert batch.kwargs == {"scale": 2}


def test_forward_that_never_calls_the_network() -> None:
    with pytest.raises(CalibrationError, match=r"forward\(model, batch\) returned without calling the model"):
        _collect([X], lambda model, item: item)


def test_inputs_that_the_network_does_not_have() -> None:
    graph = trace(PlainNet()).graph
    with pytest.raises(CalibrationError, match="a calibration batch gives mask; the network takes input: give a batch"):
        Batch((), {"mask": X}).placeholders(graph)
    with pytest.raises(CalibrationError, match="a calibration batch gives 2 inputs; the network takes input"):
        Batch((X, X)).placeholders(graph)


def test_an_input_that_is_missing() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    with pytest.raises(CalibrationError, match="a calibration batch lacks the network's input 'y'"):
        Batch((X,)).placeholders(trace(Two()).graph)


def test_a_call_leaves_the_batch_alone() -> None:
    batch = Batch((X.clone(),))
    assert torch.equal(batch.call(nn.Threshold(2.0, 5.0, inplace=True)), torch.full((2, 12), 5.0))
    assert torch.equal(batch.args[0], X)


@pytest.mark.parametrize(
    "output", [X, (X, 1), [X], {"logits": X, "loss": 1}, {"out": X, "aux": 2 * X}, SimpleNamespace(logits=X)]
)
def test_logits_are_found_in_what_networks_return(output: Any) -> None:
    assert logits_of(output) is X


@pytest.mark.parametrize("output", [{"boxes": X}, 3, (), ("text",), None])
def test_an_output_without_logits_says_what_to_set(output: Any) -> None:
    expected = f"the network returns a {type(output).__name__} without logits: .*; set distillation=None and finetuning"
    with pytest.raises(CalibrationError, match=expected):
        logits_of(output)


def test_batches_keep_their_order() -> None:
    batches = _collect(vectors(4))
    assert all(torch.equal(b.args[0], x) for b, x in zip(batches, vectors(4), strict=True))


def test_the_attention_mask_says_which_tokens_count() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = Batch(kwargs={"input_ids": mask, "attention_mask": mask})
    assert torch.equal(batch.tokens(torch.zeros(2, 3, 7)), mask.bool())
    assert batch.tokens(torch.zeros(2, 7)) is None
    assert batch.tokens(torch.zeros(2, 4, 7)) is None
    assert Batch(kwargs={"input_ids": mask}).tokens(torch.zeros(2, 3, 7)) is None


def test_a_mask_without_any_token_says_nothing() -> None:
    batch = Batch(kwargs={"attention_mask": torch.zeros(2, 3, dtype=torch.long)})
    assert batch.tokens(torch.zeros(2, 3, 7)) is None
    assert Batch(kwargs={"attention_mask": [[1, 1, 1]]}).tokens(torch.zeros(1, 3, 7)) is None


def test_inputs_that_are_not_given_have_the_values_of_the_signature() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, scale: float = 3.0, shift: float = 1.0) -> Tensor:
            return x * scale + shift

    found = Batch((X,), {"shift": 5.0}).placeholders(fx.symbolic_trace(Scaled()).graph)
    assert [(node.name, value) for node, value in found.items() if node.name != "x"] == [("shift", 5.0), ("scale", 3.0)]


def test_more_inputs_than_the_network_has_are_counted() -> None:
    with pytest.raises(CalibrationError, match="a calibration batch gives 2 inputs; the network takes input"):
        Batch((X, X)).placeholders(trace(nn.Sequential(nn.Linear(12, 2))).graph)


def test_the_size_is_that_of_the_first_tensor_with_samples() -> None:
    assert Batch((torch.tensor(1.0), X)).size == len(X)
    assert Batch((3,), {"x": [X]}).size == len(X)
    assert Batch((3,)).size == 1


def test_batches_know_their_numbers_after_some_are_gone() -> None:
    batches = Batches.of([Batch((x,)) for x in vectors(4)])
    assert Batches.of(batches) is batches
    batches.remove([1])
    assert batches.numbers == [0, 2, 3] and len(batches) == 3 and batches.given == 4
    assert [given_number(batches, index) for index in range(3)] == [0, 2, 3]
    assert given_number([Batch()] * 3, 2) == 2
    batches.replace(1, Batch((X,), {"a": 1}))
    assert batches[1].args[0] is X and batches[1].kwargs == {"a": 1}
    assert torch.equal(batches[0].args[0], vectors(4)[0])


def test_data_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "_MOST_BATCHES", 3)
    model, device = nn.Identity(), torch.device("cpu")
    assert len(list(iterate_batches((X for _ in range(3)), model, device=device, forward=None))) == 3
    with pytest.raises(CalibrationError, match="has no length and gave more than 3 batches"):
        list(iterate_batches((X for _ in range(4)), model, device=device, forward=None))
    assert len(list(iterate_batches([X] * 5, model, device=device, forward=None))) == 5


def test_forward_sees_the_networks_own_attributes() -> None:
    model = nn.Linear(12, 2)
    batch = next(iterate_batches([X], model, device=torch.device("cpu"), forward=lambda m, x: m(x[:, : m.in_features])))
    assert torch.equal(batch.args[0], X)
