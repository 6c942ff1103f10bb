"""Layers that stay float because their kind has no setting: refit and round them when the walk reaches them."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from bgd_plugin.calibration import LayerInputs, Walk
from bgd_plugin.correction import Gain, absorb_row_scale_, refitted
from bgd_plugin.encoding.small_integers import fold_to_integers
from bgd_plugin.files.rounding import round_weights_
from bgd_plugin.graph import call_input, module_at
from bgd_plugin.planning.lean import WEIGHT_BITS
from bgd_plugin.pq.integers import integers_with_feedback
from bgd_plugin.quantization.job import Job

__all__ = ["leftover_nodes", "treat_leftover"]


def leftover_nodes(job: Job) -> dict[str, tuple[str, fx.Node]]:
    """For each node at which such a layer is handled: the name of its weight, and the call that uses it."""
    due: dict[str, tuple[str, fx.Node]] = {}
    assert isinstance(job.student, fx.GraphModule)
    for node in job.student.graph.nodes:
        if node.op == "call_module" and f"{node.target}.weight" in job.survey.leftovers:
            due[node.name] = f"{node.target}.weight", node
        elif node.op == "get_attr" and node.target in job.survey.leftovers and len(node.users) == 1:
            due[node.name] = str(node.target), next(iter(node.users))
    return due


def treat_leftover(job: Job, walk: Walk, weight_name: str, call: fx.Node, coarse: str | None = None) -> Gain | None:
    """Refit a depthwise layer to the student's inputs; round any layer to its storage type.

    Args:
        job: the run; its student is changed.
        walk: positioned at the call.
        weight_name: the weight's name among the network's parameters.
        call: the node that computes with it.
        coarse: path of the batch norm that takes up the scale of each row, if the weight becomes small integers.

    Returns:
        the gain of the refit; None if there was none.
    """
    gain = gram = None
    config, storage = job.config, job.survey.storages[weight_name]
    path, _, attribute = weight_name.rpartition(".")
    owner = job.student.get_submodule(path)
    weight: Any = owner._parameters[attribute]
    is_refitted = (
        config.refit_depthwise
        and config.method == "full"
        and weight.shape[1] == 1
        and walk.differs_at(call_input(call))
    )
    if is_refitted:
        refit = refitted(weight, LayerInputs(walk, path, [call.name]), job.generator(f"{path} refit"))
        weight, gain, gram = refit.weight, refit.gain, refit.gram
        # a new parameter: the reference may share the old one
        owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
    if coarse is not None:
        weight = weight.detach()
        if gram is None:
            weight, factor = fold_to_integers(weight, WEIGHT_BITS)
        else:
            weight, factor = integers_with_feedback(weight, WEIGHT_BITS, gram)
        owner._parameters[attribute] = nn.Parameter(weight, requires_grad=False)
        absorb_row_scale_(module_at(job.student, coarse), factor)
    else:
        round_weights_(job.student, {weight_name: storage})
    if is_refitted or storage != "float32":
        walk.mark_changed(path if call.op == "call_module" else weight_name)
    return gain
