"""Settings of each stage of training."""

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
        batch_size: samples in a step; calibration batches are added up until they reach it.
        learning_rate, momentum, weight_decay: of SGD.
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
    """Training of block after block, so that each gives the float block's outputs on the student's inputs.

    It comes after the last layer is fitted and before finetuning, and takes a few hundred unlabelled samples.

    Args:
        steps: gradient steps for each block.
        batch_size: samples in a step, at most; calibration batches are cut up.
        learning_rate: of Adam, in units of each parameter's root mean square; falls to zero along a cosine.
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
    """Training of the whole network against the teacher's logits, after the last layer. Codes stay as they are.

    Give `epochs` (walks over the calibration data) or `steps`, not both; neither means 9 epochs.

    Args:
        epochs: walks over the calibration data.
        steps: gradient steps, walking over the calibration data as often as needed.
        trained: "all" trains what the network has: codebooks, biases, factors and summands of norms, and the layers
            that stay float, by Adam along a cosine, while batch norms work with their running statistics. "codebooks"
            is the paper's routine (section 3.3 of arXiv 1907.05686): the codewords alone, by SGD on mean gradients, at
            a tenth of the rate after each third of the run, while batch-norm statistics update.
        learning_rate: with "all", in units of each tensor's root mean square, 0.001 if not given; with "codebooks"
            SGD's own, the paper's 0.01.
        momentum, weight_decay: of SGD.
        mixing: blend each batch's samples with one another, so that a few hundred of them suffice; for pictures and
            other inputs that are floating point numbers.
        outputs: globs on the names of modules. What these give is drawn to what they give in the teacher, by relative
            squared difference, in place of the logits; for a network that answers with something else, such as a
            detector.
    """

    epochs: int | None = None
    steps: int | None = None
    trained: Literal["all", "codebooks"] = "all"
    learning_rate: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    mixing: bool = False
    outputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_names = isinstance(self.outputs, (tuple, list)) and all(isinstance(x, str) for x in self.outputs)
        check(is_names, f"finetuning: outputs={self.outputs!r}: give a tuple of globs on names of modules")
        object.__setattr__(self, "outputs", tuple(self.outputs))
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
        rate = self.learning_rate
        check(rate is None or rate > 0, f"finetuning: learning_rate={rate}: give a positive number")

    @property
    def rate(self) -> float:
        """The learning rate, whether given or not."""
        return self.learning_rate or {"all": 0.001, "codebooks": 0.01}[self.trained]
