"""The last steps: round to storage types, restore modes and gradient flags."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from bgd_plugin.files.rounding import round_floats_, round_weights_
from bgd_plugin.graph import module_or_none, set_modes
from bgd_plugin.nn import PQModule
from bgd_plugin.planning.lean import coarse_weights, freeze_lean_norms_
from bgd_plugin.planning.survey import Survey

__all__ = ["restore_", "round_to_storage_"]


def round_to_storage_(student: nn.Module, survey: Survey) -> None:
    """Round everything to its storage type."""
    config = survey.config
    for planned in survey.layers:
        layer = module_or_none(student, planned.target)
        if isinstance(layer, PQModule):
            layer.round_codebook_(planned.codebook_storage)
    coarse = coarse_weights(survey)
    freeze_lean_norms_(student, config)
    round_weights_(student, {name: to for name, to in survey.storages.items() if name not in coarse})
    if config.float_storage == "float16":
        round_floats_(student, survey.tables)


def restore_(student: nn.Module, model: nn.Module, learnt: Mapping[str, bool]) -> None:
    """Set the student's training modes and gradient flags to those of the user's network.

    Args:
        student: the compressed network; changed in place.
        model: the user's network.
        learnt: whether a layer's weight required gradients, by target.
    """
    set_modes(student, {path: module.training for path, module in model.named_modules()})
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(flags.get(name, True))
    for target, is_learnt in learnt.items():
        module = module_or_none(student, target)
        if isinstance(module, PQModule):
            module.codebook.requires_grad_(is_learnt)
