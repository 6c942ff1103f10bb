"""Settings of the training stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bgd_plugin.config.checks import check, check_choice, counts

__all__ = ["DistillationConfig", "FinetuningConfig", "ReconstructionConfig"]


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Training of one layer's codewords against the teacher's logits, right after the layer is quantized.

    Codes and every other layer stay as they are. The defaults are the paper's (section 3.2 of arXiv 1907.05686).

    Args:
        steps: gradient steps for each layer.
        batch_size: samples per step; calibration batches are accumulated until they reach it.
        learning_rate, momentum, weight_decay: of SGD.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 2500
    batch_size: int = 128
    learning_rate: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def __post_init__(self) -> None:
        check(counts(self.steps), f"distillation: steps={self.steps!r}: give at least 1, or distillation=None for none")
        check(counts(self.batch_size), f"distillation: batch_size={self.batch_size!r}: give at least 1")
        check(self.learning_rate > 0, f"distillation: learning_rate={self.learning_rate}: give a positive number")


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig:
    """Training of one block after another to match the float block's outputs on the student's inputs.

    Runs after the last layer is fitted and before finetuning; a few hundred unlabelled samples are enough.

    Args:
        steps: gradient steps for each block.
        batch_size: maximum samples per step; calibration batches are split.
        learning_rate: of Adam, relative to each parameter's root mean square, with cosine decay to zero.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int = 100
    batch_size: int = 32
    learning_rate: float = 0.003

    def __post_init__(self) -> None:
        check(
            counts(self.steps),
            f"reconstruction: steps={self.steps!r}: give at least 1, or reconstruction=None for none",
        )
        check(counts(self.batch_size), f"reconstruction: batch_size={self.batch_size!r}: give at least 1")
        check(self.learning_rate > 0, f"reconstruction: learning_rate={self.learning_rate}: give a positive number")


@dataclass(frozen=True, kw_only=True)
class FinetuningConfig:
    """Training of the whole network to match the teacher's logits, after the last layer is fitted.

    Give `epochs` or `steps`, not both; neither means 9 epochs.

    Args:
        epochs: passes over the calibration data.
        steps: gradient steps; the calibration data is iterated over as often as needed.
        trained: "all" trains codebooks, biases, scales and shifts of norms, and the layers that stay float, by Adam
            with cosine decay; batch norms use their running statistics. "codebooks" is the paper's routine (section 3.3
            of arXiv 1907.05686): codewords only, by SGD on mean gradients, the rate divided by ten after each third of
            the run, with batch-norm statistics updating.
        learning_rate: with "all", relative to each tensor's root mean square, default 0.001; with "codebooks", of SGD,
            default 0.01 (the paper's).
        momentum, weight_decay: of SGD.
        mixing: blend the samples of each batch with one another, so that a few hundred samples are enough; for images
            and other floating-point inputs.
        layers: globs on module names, with "all" alone: only what these modules, and those in them, hold is trained,
            which takes less time. With few samples the last stages gain most, and bear a higher rate. Empty: all.
        outputs: globs on module names. The outputs of these modules are matched to the teacher's, by relative squared
            difference, instead of the logits; for networks that do not return logits, such as detectors.
        recode_every: steps after which codes are chosen again, along the gradient of the decoded weight (PV-tuning,
            arXiv 2405.14852), with "all" alone. A change that raises the loss is undone. Entropy-coded codes take no
            more bytes than before. None: codes stay fixed.
        recode_share: largest share of a layer's codes that change at once.
        recode_trust: largest change of a layer's weight at once, as a share of its norm.
        recode_rate: step along the gradient, relative to the root mean square of the layer's weight; it falls with the
            learning rate.

    Raises:
        ConfigError: a value is out of range, or both `epochs` and `steps` are given.
    """

    epochs: int | None = None
    steps: int | None = None
    trained: Literal["all", "codebooks"] = "all"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    mixing: bool = False
    layers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    recode_every: int | None = None
    recode_share: float = 0.01
    recode_trust: float = 0.05
    recode_rate: float = 0.5

    def __post_init__(self) -> None:
        for name in ("layers", "outputs"):
            value = getattr(self, name)
            is_names = isinstance(value, (tuple, list)) and all(isinstance(x, str) for x in value)
            check(is_names, f"finetuning: {name}={value!r}: give a tuple of globs on module names")
            object.__setattr__(self, name, tuple(value))
        check(
            not self.layers or self.trained == "all",
            f"finetuning: layers={self.layers!r} with trained={self.trained!r}: layers are chosen with 'all' alone",
        )
        check(
            self.epochs is None or self.steps is None,
            f"finetuning: epochs={self.epochs} and steps={self.steps}: give one of the two",
        )
        for name in ("epochs", "steps"):
            value = getattr(self, name)
            check(
                value is None or counts(value),
                f"finetuning: {name}={value!r}: give at least 1, or finetuning=None for none",
            )
        check_choice("finetuning: trained", self.trained, ("all", "codebooks"))
        check(isinstance(self.mixing, bool), f"finetuning: mixing={self.mixing!r}: give True or False")
        self._check_recoding()
        rate = self.learning_rate
        check(rate is None or rate > 0, f"finetuning: learning_rate={rate}: give a positive number")

    def _check_recoding(self) -> None:
        every = self.recode_every
        check(
            every is None or not self.layers,
            f"finetuning: recode_every={every} with layers={self.layers!r}: codes are chosen again in all layers alone",
        )
        check(every is None or counts(every), f"finetuning: recode_every={every!r}: give at least 1, or None for never")
        check(
            every is None or self.trained == "all",
            f"finetuning: recode_every={every} with trained={self.trained!r}: codes are chosen again with 'all' alone",
        )
        for name in ("recode_share", "recode_trust"):
            value = getattr(self, name)
            check(0 < value <= 1, f"finetuning: {name}={value!r}: give a share above 0, at most 1")
        check(self.recode_rate > 0, f"finetuning: recode_rate={self.recode_rate}: give a positive number")

    @property
    def rate(self) -> float:
        """The learning rate: the given one or the default."""
        return self.learning_rate or {"all": 0.001, "codebooks": 0.01}[self.trained]
