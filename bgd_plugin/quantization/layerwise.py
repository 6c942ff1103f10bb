"""Quantize layer by layer, in execution order: each layer is fitted to the outputs of the finished layers before it."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, fx

from bgd_plugin.calibration import Rerun, Walk, logits_of
from bgd_plugin.config import BGDConfig
from bgd_plugin.correction import DriftedSkip, Gain, NormCorrection, is_batchnorm
from bgd_plugin.graph import FoundLayer, added_to, following_batchnorm_node
from bgd_plugin.nn import normalizes
from bgd_plugin.planning.lean import coarse_weights
from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.quantization.checks import require_same_layers
from bgd_plugin.quantization.job import Job
from bgd_plugin.quantization.layer import quantize_layer, treat_unreached
from bgd_plugin.quantization.leftovers import leftover_nodes, treat_leftover
from bgd_plugin.report.layer import LayerReport

__all__ = ["quantize_layers"]

Outcomes = list[LayerReport | SkippedLayer]


def quantize_layers(job: Job) -> Outcomes:
    """Quantize all layers of the plan in execution order; returns their outcomes, and changes the student."""
    job.student.requires_grad_(False)
    logits = _teacher_logits(job)
    outcomes = (_along_graph if isinstance(job.student, fx.GraphModule) else _by_runs)(job, logits)
    gains = [x.bias_gain for x in outcomes if isinstance(x, LayerReport) and x.bias_gain is not None]
    if gains:
        job.log.note(
            f"bias (matched): {len(gains)} corrected; median output error down by {statistics.median(gains):.2%} of "
            "the variance"
        )
    return outcomes


def _along_graph(job: Job, logits: list[Tensor]) -> Outcomes:
    """One walk over the graph."""
    assert isinstance(job.student, fx.GraphModule) and isinstance(job.reference, fx.GraphModule)
    walk = Walk(job.student, job.batches, job.reference if _needs_reference(job.config) else None)
    job.log.elsewhere = lambda: walk.seconds
    first_nodes: dict[str, list[int]] = {}
    for index, found in enumerate(job.survey.found):
        first_nodes.setdefault(_first_node(walk, found), []).append(index)
    norms = NormCorrection(job.student, job.config.batchnorm, job.log.timed)
    outcomes: Outcomes = []
    refits: list[Gain] = []
    leftovers, coarse = leftover_nodes(job), coarse_weights(job.survey)
    batchnorms = {node.name for node in walk.order if is_batchnorm(job.student, node)}
    for node in walk.nodes({*first_nodes, *leftovers, *batchnorms}):
        for index in first_nodes.get(node.name, ()):
            skip = _drifted_skip(job, walk, job.survey.found[index])
            norms.remember(skip)
            outcomes.append(quantize_layer(job, walk, index, logits, skip))
        if node.name in leftovers:
            with job.log.timed("refit"):
                name, call = leftovers[node.name]
                gain = treat_leftover(job, walk, name, call, coarse[name][1] if name in coarse else None)
            refits += [gain] if gain else []
        elif node.name in batchnorms:
            norms.correct_(walk, node)
    job.log.add_seconds("forward", walk.seconds)
    job.log.elsewhere = lambda: 0.0
    if refits:
        job.log.note(
            f"{len(refits)} depthwise convolutions refitted to the quantized network's inputs, {Gain.said(refits)}"
        )
    job.log.note(*norms.notes())
    return outcomes


def _by_runs(job: Job, logits: list[Tensor]) -> Outcomes:
    """Quantize a network without a graph, by partial runs of the network itself."""
    indices = {found.name: index for index, found in enumerate(job.survey.found)}
    norms = [path for path, module in job.student.named_modules() if normalizes(module)]
    weights = {found.name: found.weight for found in job.survey.found}
    known, finishes = (tuple(weights), tuple(norms)), bool(job.config.distillation)
    records = job.records.get(known)
    walk = Rerun(job.student, job.reference, job.batches, weights, norms, finishes=finishes, records=records)
    job.records[known] = walk.records
    require_same_layers(walk.order)
    corrections = NormCorrection(job.student, job.config.batchnorm, job.log.timed)
    outcomes: Outcomes = []
    for name in walk.order:
        if name in indices:
            outcomes.append(quantize_layer(job, walk, indices[name], logits, None))
        elif any(isinstance(outcome, LayerReport) for outcome in outcomes):
            corrections.correct_at_(walk, name)
    outcomes += [treat_unreached(job, index) for name, index in indices.items() if name not in walk.order]
    if walk.strayed:
        names = ", ".join(sorted(walk.strayed))
        job.log.note(f"fitted without float inputs, because the float network took another branch: {names}")
    if walk.is_whole:
        job.log.note(
            "the whole network was run for each layer: its modules pass on more than they return, so their outputs "
            "could not be reused"
        )
    job.log.add_seconds("forward", walk.seconds)
    job.log.note(*corrections.notes())
    return outcomes


def _needs_reference(config: BGDConfig) -> bool:
    return config.batchnorm == "matched" or config.method == "full"


def _first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is fitted: its first call, or the node that reads the weight for it."""
    for node in walk.order:
        if (node.op == "call_module" and node.target in (layer.target, *layer.tied)) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")


def _drifted_skip(job: Job, walk: Walk, found: FoundLayer) -> DriftedSkip | None:
    """The skip connection whose drift a layer compensates for: it ends a residual branch, and the skip has run."""
    config = job.config
    if config.method != "full" or not config.asymmetric_step or config.batchnorm != "matched":
        return None
    assert isinstance(job.student, fx.GraphModule)
    if job.batchnorm_after(found) is None:
        return None
    norm = following_batchnorm_node(job.student, found.calls)
    skip = None if norm is None else added_to(job.student, norm)
    return None if norm is None or skip is None or not walk.differs(skip) else DriftedSkip(norm=norm, node=skip)


@torch.no_grad()
def _teacher_logits(job: Job) -> list[Tensor]:
    """The teacher's logits for each calibration batch, if distillation needs them."""
    if not job.config.distillation or job.teacher is None:
        return []
    with job.log.timed("teacher"):
        return [logits_of(batch.call(job.teacher)) for batch in job.batches]
