"""Quantization without data: k-means on the blocks of each weight.

Much less accurate than `quantize`, which uses each layer's inputs. For frameworks whose interface has no calibration
data, and as a start for training.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bgd_plugin.config import BGDConfig, given_config
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.content import measured_size
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.fitting import FittedLayer, fit_weight
from bgd_plugin.graph import Front, baked, copy_module, find_layers, fold_parametrizations_, install_, isolated
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.coded import as_coded
from bgd_plugin.planning.layer_settings import decided
from bgd_plugin.planning.sizes import paper_bytes
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.planning.types import PlannedLayer, SkippedLayer
from bgd_plugin.quantization.finish import round_to_storage_
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Quantized, Report
from bgd_plugin.support.log import Log
from bgd_plugin.support.processes import is_first
from bgd_plugin.support.seeds import seeded

__all__ = ["quantize_module", "quantize_weights"]

_NOTE = "quantized without data, each weight by itself; calibration data would make it much more accurate"


@isolated
@torch.no_grad()
def quantize_weights(model: nn.Module, config: BGDConfig | None = None, *, progress: bool = True) -> Quantized:
    """Compress a network without data.

    Args:
        model: the float network; never changed.
        config: what to quantize; settings of the fit (`method`, `rounds`, `batchnorm`) do not apply.
        progress: show progress bars.

    Returns:
        the compressed network, of the class of `model`, and a report whose relative errors are those of the weights.

    Raises:
        ConfigError: as `quantize`; or the settings ask for distillation or finetuning, which need data.
    """
    config = given_config(config).decided(has_data=False)
    shown = progress and is_first()
    wanted = [name for name in ("distillation", "reconstruction", "finetuning") if getattr(config, name) is not None]
    if wanted:
        raise ConfigError(f"{' and '.join(wanted)}: training needs data: use quantize, or set None")
    log = Log()
    with log.timed("fit"):
        model = baked(model)
        student: nn.Module = copy_module(model)
        folded = fold_parametrizations_(student)
        survey = surveyed(Front(own=student, network=student, folded=folded), config, original=model)
        survey.require_some()
        if (budget := Budget.of(survey)) is not None:
            survey = budget.spend(None, progress=shown)
        reports = []
        bar = tqdm(survey.chosen, disable=not shown, desc="quantize", unit="layer", dynamic_ncols=True)
        for layer, planned in bar:
            matrix = layer.matrix.detach()
            fit = _fitted(matrix, planned, config)
            modules = install_(student, layer, fit.codebook, fit.codes, planned.kept(matrix), fit.form)
            for module in modules:
                module.codebook.requires_grad_(layer.weight.requires_grad)
            planned = as_coded(planned, modules[0])
            reports.append(
                LayerReport.of(planned, relative_error=_weight_error(matrix, modules[0].matrix), warnings=fit.warnings)
            )
        survey = dataclasses.replace(survey, beside=())  # whose weights are rounded now: the old ones can go
        round_to_storage_(student, survey)
    report = Report(
        layers=tuple(reports),
        skipped=survey.skipped,
        original_bytes=survey.original_bytes,
        compressed_bytes=measured_size(student),
        paper_bytes=paper_bytes(student),
        memory_bytes=state_bytes(student.state_dict()),
        seconds=log.seconds,
        notes=(*survey.notes, _NOTE),
    )
    return Quantized(student, report)


@isolated
@torch.no_grad()
def quantize_module(module: nn.Module, config: BGDConfig | None = None, *, name: str = "the layer") -> PQModule:
    """The product-quantized form of one convolution or linear layer, fitted without data.

    Args:
        module: the layer; never changed, but its bias is shared with the result.
        config: the setting for the layer's kind and `codebook_storage` apply.
        name: the layer's name in messages.

    Returns:
        the product-quantized module, on the layer's device.

    Raises:
        ConfigError: the module is already quantized, is not a convolution or linear layer, or stays float under these
            settings.
    """
    config = given_config(config)
    holder = nn.Module()
    holder.add_module("layer", module)
    found, left = find_layers(holder)
    reason = left[0].reason if left else f"a {type(module).__name__} has no product-quantized form"
    outcome = decided(found[0], config, is_first=False) if found else SkippedLayer(name=name, reason=reason)
    if isinstance(outcome, SkippedLayer):
        raise ConfigError(f"{name} cannot be quantized: {outcome.reason}")
    matrix = found[0].matrix.detach()
    fit = _fitted(matrix, outcome, config)
    result = quantized(module, fit.codebook, fit.codes, outcome.kept(matrix), fit.form)
    result.codebook.requires_grad_(found[0].weight.requires_grad)
    return result


def _fitted(weight: Tensor, planned: PlannedLayer, config: BGDConfig) -> FittedLayer:
    """Fit one weight `[rows, ...]`; the result does not depend on other layers."""
    if weight.is_meta:
        raise ConfigError(
            f"layer {planned.name!r} is on the meta device and has no values: it can be planned, but not quantized"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"layer {planned.name!r} contains NaN or infinite values: repair the network first")
    generator = seeded(config.seed, tuple(weight.shape))
    gram = torch.eye(planned.block_size, dtype=torch.float32, device=weight.device)
    return fit_weight(weight, gram, planned, planned.kept(weight), config.em_iterations, generator)


def _weight_error(weight: Tensor, decoded: Tensor) -> float:
    kept, lost = (
        float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2 for values in (weight, weight - decoded)
    )
    return lost / kept if kept else 0.0
