"""Plan a network: which layers are quantized, into what, and how many bytes that takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.calibration import Batch, Forward, checked, collect_batches, take_aside_
from bgd_plugin.config import BGDConfig, given_config
from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.graph import baked, find_layers, front_end, isolated, set_modes, unwrapped
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.choosing import choose_sizes, energy_left
from bgd_plugin.planning.measure import measured
from bgd_plugin.planning.sizes import Sketch, planned_paper_bytes
from bgd_plugin.planning.survey import Survey, surveyed
from bgd_plugin.planning.types import CurvePoint, Plan
from bgd_plugin.support.processes import is_first

__all__ = ["layers_in", "plan"]


@isolated
def plan(
    model: nn.Module | ExportedProgram,
    config: BGDConfig | None = None,
    calibration: Iterable[Any] | None = None,
    *,
    forward: Forward | None = None,
    progress: bool = True,
    original_bytes: int | None = None,
) -> Plan:
    """Show what `quantize(model, ..., config)` will do. Without data the model may be on the meta device.

    Args:
        model: the float network; never changed.
        config: what to quantize and how; `BGDConfig()` if not given.
        calibration: unlabelled batches, as in `quantize`. With them the effect of each layer's error on the output is
            measured: the plan has the sizes that `quantize` would choose, and the curve of bytes against expected
            divergence. That takes a fraction of the time of `quantize`.
        forward: as in `quantize`, for batches of any other form.
        progress: show a progress bar while the layers are measured, or without data, estimated for a budget.
        original_bytes: as in `quantize`: the bytes of the network before earlier steps such as pruning.

    Returns:
        the plan; `str(plan)` is a table.

    Raises:
        ConfigError: a block size that does not divide a layer's row, a glob that matches nothing, no layer to quantize,
            or a budget that cannot be met.
    """
    config = given_config(config).decided(has_data=calibration is not None)
    model = baked(unwrapped(model))
    front = front_end(model, share_tensors=True)
    survey = surveyed(front, config, original=model, original_bytes=original_bytes)
    survey.require_some()
    batches, aside = None, list[Batch]()
    if calibration is not None:
        device = next(model.parameters()).device
        batches = collect_batches(calibration, model, device=device, forward=forward)
        front = checked(front, batches)
        set_modes(front.network, {"": False})
        survey = surveyed(front, survey.config, original=model, original_bytes=original_bytes)
        aside = take_aside_(batches, survey.config.kept_aside)
    sketch = Sketch(survey)
    budget = Budget.of(survey, sketch)
    curve: tuple[CurvePoint, ...] = ()
    if batches is not None:
        chooser = budget or Budget.free_of(survey, sketch)
        measurements = measured(chooser, batches, aside, progress=progress)
        if budget is None and measurements.sensitivities:
            curve = chooser.curve(measurements.sensitivities)
        with measurements.prepared():
            survey = survey if budget is None else choose_sizes(budget, measurements, energy_left(budget))
    elif budget is not None:
        survey = budget.spend(None, progress=progress and is_first())
    return Plan(
        layers=survey.layers,
        skipped=survey.skipped,
        original_bytes=survey.original_bytes,
        compressed_bytes=sketch.file_size(survey.chosen, survey.storages),
        paper_bytes=planned_paper_bytes(survey),
        notes=survey.notes,
        expected_divergence=survey.expected_divergence,
        curve=curve or survey.curve,
        memory_bytes=_memory_bytes(survey),
    )


def _memory_bytes(survey: Survey) -> int:
    """All of the network, with codes and codebooks in the place of weights."""
    weights = {id(found.weight): found.weight for found in survey.found}
    rest = state_bytes(survey.own.state_dict()) - sum(w.numel() * w.element_size() for w in weights.values())
    return rest + sum(planned.memory_bytes for planned in survey.layers)


def layers_in(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """All layers with a product-quantized form, regardless of settings, and the reasons why others have none.

    Args:
        model: the network; never changed.

    Returns:
        the family (setting of `BGDConfig`) by layer name, in execution order; the reason by name.
    """
    found, left = find_layers(front_end(baked(model), share_tensors=True).network)
    return {layer.name: layer.family for layer in found}, {layer.name: layer.reason for layer in left}
