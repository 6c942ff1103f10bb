"""`.pt2`, a program of `torch.export`: for torch without this library, and for AOTInductor.

Codes and codebooks are stored as in memory; weights are decoded at each run, unless a compiler folds them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.capture import captured
from bgd_plugin.exporting.examples import Examples, tensors_in
from bgd_plugin.exporting.result import Run
from bgd_plugin.graph import copy_module
from bgd_plugin.nn import PQModule

__all__ = ["run", "write"]


def write(model: nn.Module, path: Path, examples: Examples, dynamic: Any) -> tuple[str, ...]:
    """Write the network as a program, without the example inputs, which `torch.export.save` would keep.

    Args:
        model: the compressed network, in evaluation mode.
        path: the file.
        examples: what it is traced with.
        dynamic: torch.export's dynamic_shapes, or None.

    Raises:
        BGDError: torch.export cannot capture the network.
    """
    model = copy_module(model, share_tensors=True)
    layers = [module for module in model.modules() if isinstance(module, PQModule)]
    for layer in layers:
        if layer.codes.element_size() > 2 and layer.code_bits < 16:
            layer.codes = layer.codes.to(torch.int16)
    program = captured(model, examples, dynamic)
    program._example_inputs = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        torch.export.save(program, path)
    wide = [layer for layer in layers if layer.code_bits < 8 * layer.codes.element_size()]
    saved = sum(m.codes.numel() * (8 * m.codes.element_size() - m.code_bits) for m in wide) // 8
    note = f"codes of {len(wide)} layers take whole bytes here, {saved:,} bytes more than packed: .onnx packs them"
    return (note,) if saved else ()


def run(path: Path, examples: Examples) -> Run:
    """Load the file at `path`, and run it on the examples.

    Raises:
        BGDError: torch cannot load or run it.
    """
    try:
        program = torch.export.load(path)
        with torch.no_grad():
            outputs = program.module()(*examples.args, **examples.kwargs)
    except Exception as error:  # torch's own errors, of many types
        raise BGDError(f"torch {torch.__version__} cannot run the exported network: {error}") from error
    return Run(outputs=tensors_in(outputs), is_folded=False, runtime=f"torch {torch.__version__}")
