"""Export of a network: write the file, run it in its runtime, compare the outputs, and only then rename it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from bgd_plugin.errors import BGDError, ConfigError
from bgd_plugin.exporting.compare import largest_difference
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.exporting.result import Exported
from bgd_plugin.exporting.targets import target_of
from bgd_plugin.files.format import file_size, packed_size, stored
from bgd_plugin.graph import copy_module, set_modes, widen_
from bgd_plugin.graph.computed import set_apart_
from bgd_plugin.nn import PQModule

__all__ = ["export"]


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic: Any = False,
    tolerance: float = 1e-4,
) -> Exported:
    """Write a compressed network as one small file of another runtime, and check that file there.

    The file is written beside `path`, run in its runtime on the example inputs, and renamed only if its outputs are
    those of the network. The network is exported in evaluation mode and is not changed.

    Args:
        model: the `.model` that `bgd_plugin.quantize` returns, or the network that `bgd_plugin.load` returns.
        path: the file; its suffix selects the target: `.onnx`, `.mlpackage` (Core ML), `.pt2`.
        example_inputs: of one call: a tensor, a tuple of positional arguments, or a mapping of keyword arguments.
        dynamic: False: the exported network takes the shapes of the example inputs. True: any batch size, the first
            dimension of each tensor. Anything else is `dynamic_shapes` of `torch.export.export`.
        tolerance: largest allowed difference between an output of the file and of the network, relative to the range of
            that output's values; above it, an error is raised and no file is written.

    Returns:
        size in bytes, largest difference, and whether the weights are decoded once, when the file is loaded.

    Raises:
        ConfigError: an unknown suffix, a missing folder, or example inputs without a tensor.
        BGDError: a package is missing (the message names the extra), the network cannot be exported, or the file's
            outputs differ from the network's.
    """
    place = Path(path)
    target = target_of(place)
    if not place.parent.is_dir():
        raise ConfigError(f"{path}: the folder {place.parent} does not exist: create it first")
    network = _ready(model)
    examples = Examples.of(example_inputs)
    cases = [examples, examples.batched(2)] if dynamic is True else [examples]
    expected = [case.answers(network) for case in cases]
    shapes = examples.dynamic_shapes() if dynamic is True else dynamic or None
    with _beside(place) as temporary:
        # with the largest batch, because torch.export fixes a dimension of 1
        notes = target.write(network, temporary, cases[-1], shapes)
        runs = [] if target.run is None else [target.run(temporary, case) for case in cases]
        pairs = zip(runs, expected[: len(runs)], strict=True)
        differences = [largest_difference(run.outputs, wanted) for run, wanted in pairs]
        content = stored(model)
        result = Exported(
            path=place,
            size_bytes=_size(temporary),
            file_bytes=file_size(content),
            packed_bytes=packed_size(content),
            largest_difference=max(differences) if runs else None,
            is_folded=runs[0].is_folded if runs else None,
            runtime=runs[0].runtime if runs else "",
            notes=notes,
        )
        _require_same(result, tolerance)
        _put(temporary, place)
    return result


def _ready(model: nn.Module) -> nn.Module:
    """A copy on the CPU in evaluation mode, which shares the tensors that are on the CPU already.

    Raises:
        ConfigError: not a network.
        BGDError: nothing in the network is quantized, or it is on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the network is a {type(model).__name__}: give the .model that bgd_plugin.quantize returns")
    if not any(isinstance(module, PQModule) for module in model.modules()):
        raise BGDError(
            "the network has no product-quantized layer: export the .model that bgd_plugin.quantize returns; for a "
            "float network use torch.onnx.export or torch.export"
        )
    tensors = (*model.parameters(), *model.buffers())
    if any(tensor.is_meta for tensor in tensors):
        raise BGDError("the network has no values (it is on the meta device): load them first")
    is_elsewhere = any(tensor.device.type != "cpu" for tensor in tensors)
    network = widen_(copy_module(model, share_tensors=not is_elsewhere))
    set_modes(network, {"": False})  # graphs made by torch.export cannot switch modes themselves
    set_apart_(network)
    return network.cpu() if is_elsewhere else network


def _require_same(result: Exported, tolerance: float) -> None:
    """Refuse a file whose outputs are not the network's."""
    difference = result.largest_difference
    if difference is not None and not difference <= tolerance:
        raise BGDError(
            f"{result.path} was not written: in {result.runtime} the exported network differs from the network by "
            f"{difference:.1e} of the output's range, more than the tolerance of {tolerance:.1e}. Raise `tolerance` if "
            "that is acceptable"
        )


def _size(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    return sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())


def _put(temporary: Path, place: Path) -> None:
    """Rename a file or a folder to its final path; an existing one is replaced."""
    if place.is_dir() and temporary.is_dir():
        os.replace(place, temporary.with_name(f"{place.name}.before"))
    os.replace(temporary, place)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder next to `place`, which is removed at the end."""
    folder = tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent)
    try:
        yield Path(folder) / place.name
    finally:
        shutil.rmtree(folder, ignore_errors=True)
