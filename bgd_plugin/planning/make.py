"""Plan a network without data: which layers are quantized, into what, and how many bytes that takes."""

from __future__ import annotations

from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import baked, copy_module, find_layers, front_end, isolated, unwrapped
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.sizes import Sketch, planned_paper_bytes
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.planning.types import Plan

__all__ = ["layers_in", "plan"]


@isolated
def plan(
    model: nn.Module | ExportedProgram, config: BGDConfig | None = None, *, original_bytes: int | None = None
) -> Plan:
    """What `quantize(model, ..., config)` will do, without data. The model may be on the meta device.

    Args:
        model: the float network; it is left untouched.
        config: what to quantize and how; `BGDConfig()` if not given.
        original_bytes: as in `quantize`: the bytes of the network that a chain of steps started from.

    Raises:
        ConfigError: a block size that does not divide its layer, a glob that matches nothing, no layer to quantize.
    """
    model = baked(unwrapped(model))
    network, folded = front_end(copy_module(model, share_tensors=True))
    survey = surveyed(network, config or BGDConfig(), original=model, original_bytes=original_bytes, folded=folded)
    survey.require_some()
    sketch = Sketch(survey)
    budget = Budget.of(survey, sketch)
    if budget is not None:
        survey = budget.spend(None)
    return Plan(
        layers=survey.layers,
        skipped=survey.skipped,
        original_bytes=survey.original_bytes,
        compressed_bytes=sketch.file_size(survey.chosen),
        paper_bytes=planned_paper_bytes(survey),
        notes=survey.notes,
    )


def layers_in(model: nn.Module) -> tuple[dict[str, str], dict[str, str]]:
    """Every layer that has a product-quantized form, whatever the settings, with its family; why the others have none.

    Returns:
        the family of `BGDConfig` by layer name, in the order in which they run; the reason by name.
    """
    found, left = find_layers(front_end(copy_module(baked(model), share_tensors=True))[0])
    return {layer.name: layer.family for layer in found}, {layer.name: layer.reason for layer in left}
