"""Training on unlabelled data: batch norms, one layer's codewords, block after block, all codewords together."""

from bgd_plugin.training.batchnorm import (
    absorb_row_scale_,
    correct_batchnorm_,
    correct_batchnorm_at_,
    is_batchnorm,
    is_shared,
    row_scale_bounds,
)
from bgd_plugin.training.distillation import distill_
from bgd_plugin.training.finetuning import Epochs, finetune_
from bgd_plugin.training.loss import kl_to_teacher
from bgd_plugin.training.reconstruction import reconstruct_, reconstruction_steps

__all__ = [
    "Epochs",
    "absorb_row_scale_",
    "correct_batchnorm_",
    "correct_batchnorm_at_",
    "distill_",
    "finetune_",
    "is_batchnorm",
    "is_shared",
    "kl_to_teacher",
    "reconstruct_",
    "reconstruction_steps",
    "row_scale_bounds",
]
