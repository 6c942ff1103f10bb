"""The network as torch.export sees it: one graph of plain operators."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.examples import Examples

__all__ = ["captured", "reason"]

_TRACES = ("custom", "nn_module_stack", "source_fn_stack", "stack_trace", "torch_fn")
"""Metadata of nodes about their source: paths of files, and class names of layers that have been replaced."""


def captured(model: nn.Module, examples: Examples, dynamic: Any) -> ExportedProgram:
    """Capture a network in evaluation mode, without traces of its source.

    Args:
        model: the network.
        examples: arguments of one call.
        dynamic: torch.export's dynamic_shapes, or None.

    Raises:
        BGDError: the network cannot be captured, with torch's reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own code
            program = torch.export.export(model, examples.args, examples.kwargs, dynamic_shapes=dynamic, strict=False)
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        raise BGDError(
            f"torch.export cannot capture the network: {reason(error)}. Export the part of the network that it can "
            "capture, or change its forward"
        ) from error
    for node in program.graph.nodes:
        for key in _TRACES:
            node.meta.pop(key, None)
    return program


def reason(error: BaseException) -> str:
    """The innermost cause of an exporter's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:500]}"
