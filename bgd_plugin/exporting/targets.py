"""The targets of an export by suffix, and the packages that each needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bgd_plugin.errors import BGDError, ConfigError
from bgd_plugin.exporting import pt2
from bgd_plugin.exporting.coreml import write as coreml_write
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.exporting.onnx import run as onnx_run
from bgd_plugin.exporting.onnx import write as onnx_write
from bgd_plugin.exporting.result import Run

__all__ = ["TARGETS", "Target", "target_of"]

_DENSE = {
    ".pte": "ExecuTorch",
    ".tflite": "LiteRT",
    ".engine": "TensorRT",
    ".plan": "TensorRT",
}
"""Suffixes of runtimes that cannot decode weights when they load a file."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A kind of file that a network is exported to.

    Attributes:
        name: its usual name.
        extra: the extra of this package that installs what the export needs; empty if nothing is needed.
        modules: the modules that the export imports.
        write: writes the file. Its arguments are the network in evaluation mode, the path, the examples, and
            torch.export's dynamic_shapes or None. It returns notes for the user.
        run: runs the file on examples in its runtime; None if no runtime on this system runs it.
    """

    name: str
    extra: str
    modules: tuple[str, ...]
    write: Callable[[nn.Module, Path, Examples, Any], tuple[str, ...]]
    run: Callable[[Path, Examples], Run] | None


TARGETS = {
    ".onnx": Target(
        name="ONNX",
        extra="onnx",
        modules=("onnx", "onnx_ir", "onnxscript", "onnxruntime"),
        write=onnx_write.write,
        run=onnx_run.run,
    ),
    ".mlpackage": Target(name="Core ML", extra="coreml", modules=("coremltools",), write=coreml_write.write, run=None),
    ".pt2": Target(name="torch.export", extra="", modules=(), write=pt2.write, run=pt2.run),
}
"""By suffix."""


def target_of(path: Path) -> Target:
    """The target selected by a path's suffix, whose packages are installed.

    Raises:
        ConfigError: no target has this suffix.
        BGDError: a package is missing.
    """
    suffix = path.suffix.lower()
    known = ", ".join(f"{ending} ({target.name})" for ending, target in TARGETS.items())
    if suffix in _DENSE:
        raise ConfigError(
            f"{path}: {_DENSE[suffix]} cannot decode weights when it loads a file, and decoding them at each run takes "
            "many times as long: export bgd_plugin.materialize(model) with its own exporter (docs/export.md); suffixes "
            f"that keep the weights small: {known}"
        )
    if suffix not in TARGETS:
        raise ConfigError(f"{path}: unknown suffix; the suffix selects the target: {known}")
    target = TARGETS[suffix]
    missing = [name for name in target.modules if importlib.util.find_spec(name) is None]
    if missing:
        raise BGDError(
            f"{path}: exporting to {target.name} needs {', '.join(missing)}: pip install 'bgd-plugin[{target.extra}]'"
        )
    return target
