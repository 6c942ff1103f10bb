"""Run an ONNX file in onnxruntime, and find out whether its weights are decoded once, at load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bgd_plugin.errors import BGDError
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.exporting.result import Run

__all__ = ["run"]

_ERRORS_ONLY = 3


def run(path: Path, examples: Examples) -> Run:
    """Load the file at `path` with onnxruntime's default settings, and run it on the examples.

    Raises:
        BGDError: onnxruntime cannot load or run it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.enable_profiling = True
    options.profile_file_prefix = str(path.with_suffix(""))
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]
        outputs = session.run(None, dict(zip(names, (_array(value) for value in examples.tensors), strict=True)))
    except Exception as error:  # a runtime's own errors, of many types
        raise BGDError(f"onnxruntime {onnxruntime.__version__} cannot run the exported network: {error}") from error
    profile = Path(session.end_profiling())
    executed = _executed(profile)
    profile.unlink(missing_ok=True)
    return Run(
        outputs=tuple(torch.from_numpy(output) for output in outputs),
        is_folded=not executed & _constant_nodes(path),
        runtime=f"onnxruntime {onnxruntime.__version__}",
    )


def _array(value: Tensor) -> Any:
    return value.detach().cpu().contiguous().numpy()


def _executed(profile: Path) -> set[str]:
    """Names of the nodes that ran."""
    events = json.loads(profile.read_text(encoding="utf-8"))
    return {str(event["name"]).removesuffix("_kernel_time") for event in events if event.get("cat") == "Node"}


def _constant_nodes(path: Path) -> set[str]:
    """Names of the nodes that depend on no input, which a runtime can compute once."""
    import onnx

    graph = onnx.load(str(path)).graph
    constants = {tensor.name for tensor in graph.initializer} | {""}
    names = set()
    for node in graph.node:
        if not any(attribute.HasField("g") for attribute in node.attribute) and constants.issuperset(node.input):
            constants.update(node.output)
            names.add(node.name)
    return names
