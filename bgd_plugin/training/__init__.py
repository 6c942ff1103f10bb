"""Training on unlabelled data: distillation per layer, reconstruction per block, finetuning of the whole network."""

from bgd_plugin.training.distillation import distill_
from bgd_plugin.training.finetuning import Epochs, finetune_
from bgd_plugin.training.loss import kl_to_teacher
from bgd_plugin.training.module_blocks import reconstruct_modules_
from bgd_plugin.training.reconstruction import reconstruct_, reconstruction_steps

__all__ = [
    "Epochs",
    "distill_",
    "finetune_",
    "kl_to_teacher",
    "reconstruct_",
    "reconstruct_modules_",
    "reconstruction_steps",
]
