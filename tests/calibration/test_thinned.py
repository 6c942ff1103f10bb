"""Logits at some of the tokens against those of the whole network."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch, answers_at_some_tokens, at_first_tokens
from tests.networks import randomized

TOKENS, WIDTH, WORDS = 13, 8, 30


class Language(nn.Module):
    """Tokens in, logits out; what follows the head is given."""

    def __init__(self, after: Callable[[Tensor], Any] = lambda logits: SimpleNamespace(logits=logits)) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS)
        self._after = after

    def forward(self, x: Tensor) -> Any:
        x = torch.relu(self.body(x)).cumsum(1)
        return self._after(self.head(input=x))


def _batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [Batch((torch.randn(samples, TOKENS, WIDTH, generator=generator),)) for samples in (2, 1)]


def _counted(network: Language) -> list[int]:
    """How many tokens each call of the head has."""
    tokens: list[int] = []
    network.head.register_forward_hook(lambda _, __, logits: tokens.append(logits.shape[1]))
    return tokens


def _thin(network: nn.Module, most: int = 3 * TOKENS * WORDS // 4) -> Any:
    outputs = [batch.call(network) for batch in _batches()]
    return answers_at_some_tokens(network, _batches(), outputs, most)


def test_the_head_runs_on_some_tokens_and_gives_the_logits_that_they_have() -> None:
    network = randomized(Language())
    tokens = _counted(network)
    found = _thin(network)
    assert found is not None
    head, outputs = found
    assert (head.path, head.every) == ("head", 4)
    assert tokens == [13, 13, 4, 4]
    for batch, output in zip(_batches(), outputs, strict=True):
        whole = batch.call(network).logits
        torch.testing.assert_close(output.logits, whole[:, ::4])
        with head.thinned(network):
            torch.testing.assert_close(batch.call(network).logits, whole[:, ::4])
        assert batch.call(network).logits.shape[1] == TOKENS


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: SimpleNamespace(logits=logits - logits.mean(1, keepdim=True)),  # tokens tell of each other
        lambda logits: SimpleNamespace(logits=logits + torch.arange(TOKENS)[:, None]),  # all are wanted
        lambda logits: SimpleNamespace(logits=logits.roll(1, 1)),
        lambda logits: SimpleNamespace(logits=logits[:, -1]),
        lambda logits: {"scores": logits},
    ],
)
def test_a_network_that_needs_all_tokens_has_them(after: Callable[[Tensor], Any]) -> None:
    assert _thin(randomized(Language(after))) is None


def test_tokens_are_left_out_only_where_there_are_twice_as_many_as_wanted() -> None:
    numbers = 3 * TOKENS * WORDS
    assert _thin(randomized(Language()), numbers // 2) is not None
    assert _thin(randomized(Language()), numbers // 2 + 1) is None


def test_logits_that_are_no_linear_layers_are_all_computed() -> None:
    class Tied(Language):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=self.body(x).cumsum(1) @ self.head.weight.T)

    assert _thin(randomized(Tied())) is None


def test_texts_end_early_where_no_token_reads_later_ones() -> None:
    network, batches = randomized(Language()), _batches()
    short = at_first_tokens(network, batches, 5)
    assert short is not None and [batch.args[0].shape for batch in short] == [(2, 5, WIDTH), (1, 5, WIDTH)]
    for batch, whole in zip(short, batches, strict=True):
        assert torch.equal(batch.args[0], whole.args[0][:, :5])
    assert at_first_tokens(network, batches, TOKENS) is None


@pytest.mark.parametrize(
    "after",
    [
        lambda logits: SimpleNamespace(logits=logits - logits.mean(1, keepdim=True)),
        lambda logits: SimpleNamespace(logits=logits + torch.arange(TOKENS)[:, None]),
        lambda logits: SimpleNamespace(logits=logits[:, -1]),
        lambda logits: {"scores": logits},
    ],
)
def test_texts_stay_whole_where_later_tokens_matter(after: Callable[[Tensor], Any]) -> None:
    assert at_first_tokens(randomized(Language(after)), _batches(), 5) is None


def test_texts_stay_whole_where_other_inputs_are_not_by_token() -> None:
    batches = [Batch((batch.args[0],), {"other": torch.zeros(len(batch.args[0]))}) for batch in _batches()]
    assert at_first_tokens(randomized(Language()), batches, 5) is None
