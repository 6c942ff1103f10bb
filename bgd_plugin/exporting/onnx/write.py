"""Write an ONNX file: torch's exporter, then tensors as narrow as in our own file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.capture import captured, reason
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.exporting.onnx.narrow import narrow_
from bgd_plugin.exporting.onnx.tidy import simplify_, strip_

__all__ = ["write"]

_LONGEST = 2**31 - 1
"""Maximum bytes of a protobuf message."""


def write(model: nn.Module, path: Path, examples: Examples, dynamic: Any) -> tuple[str, ...]:
    """Write the network to an ONNX file; returns no notes.

    Args:
        model: the compressed network, in evaluation mode.
        path: the file.
        examples: what it is traced with.
        dynamic: torch.export's dynamic_shapes, or None.

    Raises:
        BGDError: torch.export cannot capture the network, an operator has no ONNX form, or the file is too long.
    """
    import onnx_ir

    program = _exported(model, examples, dynamic)
    simplify_(program.model)
    narrow_(program.model.graph, model)
    strip_(program.model)
    content = onnx_ir.to_proto(program.model).SerializeToString()
    if len(content) > _LONGEST:
        raise BGDError(f"the ONNX file would have {len(content):,} bytes, more than the format's 2 GiB")
    path.write_bytes(content)
    return ()


def _exported(model: nn.Module, examples: Examples, dynamic: Any) -> Any:
    program = captured(model, examples, dynamic)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter warns about its own code
            # optimize=True would decode small layers
            return torch.onnx.export(program, dynamo=True, optimize=False, verbose=False)
    except Exception as error:  # of many types
        raise BGDError(f"torch.onnx.export cannot convert the network: {reason(error)}") from error
