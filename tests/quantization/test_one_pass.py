"""What a further pass takes over from the one before it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.graph import front_end
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.quantization.one_pass import _begin_alike


class _Reader(nn.Module):
    """A table of rows, and two layers behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(300, 16), nn.Linear(16, 64), nn.Linear(64, 40)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.mix(self.words(words).mean(1))))
        return logits


def _survey() -> Survey:
    model = _Reader().eval()
    return surveyed(front_end(model), bgd.BGDConfig(embedding=bgd.LayerConfig()), original=model)


def _with(survey: Survey, name: str, codebook_size: int) -> Survey:
    chosen = tuple(
        (found, dataclasses.replace(planned, codebook_size=codebook_size) if planned.name == name else planned)
        for found, planned in survey.chosen
    )
    return dataclasses.replace(survey, chosen=chosen)


def test_fits_are_kept_where_only_layers_behind_the_table_change() -> None:
    survey = _survey()
    assert _begin_alike(survey, survey)
    assert _begin_alike(survey, _with(survey, "mix", 16))


def test_fits_are_forgotten_where_a_table_or_a_float_weight_is_stored_otherwise() -> None:
    """They made good what the table lost."""
    survey = _survey()
    assert not _begin_alike(survey, _with(survey, "words", 16))
    rest = tuple(pair for pair in survey.chosen if pair[0].name != "words")
    narrow = survey.budgeted(rest, {}, (), None, {"words.weight": "int8"})
    assert not _begin_alike(survey, narrow) and _begin_alike(narrow, narrow)
    half = survey.budgeted(rest, {}, (), None, {})
    assert not _begin_alike(narrow, half)
