"""Write a Core ML package, and read it back to check that its tables are the network's weights."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn
from torch._decomp import get_decompositions

from bgd_plugin.errors import BGDError, ConfigError
from bgd_plugin.exporting.capture import captured, reason
from bgd_plugin.exporting.coreml.tables import Tables
from bgd_plugin.exporting.examples import Examples
from bgd_plugin.nn import PQModule

__all__ = ["read_back", "write"]

_PASS = "bgd_plugin::tables"
_HALF = "_cast_fp16"
"""Suffix of the names of values that coremltools computes in half precision."""
_NEAR = 1e-3
"""Largest difference of a weight that was read back, relative to the largest weight: half precision."""


def write(model: nn.Module, path: Path, examples: Examples, dynamic: Any) -> tuple[str, ...]:
    """Write the network to a package for iOS 18 and macOS 15, with arithmetic in half precision.

    The Neural Engine supports no other.

    Args:
        model: the compressed network, in evaluation mode.
        path: the package, a folder.
        examples: what it is traced with.
        dynamic: must be None: a package has the shapes of the examples.

    Returns:
        notes: the check of the tables, and the layers whose form the Neural Engine may not support.

    Raises:
        ConfigError: `dynamic` is given.
        BGDError: coremltools cannot convert the network, or reads other weights back.
    """
    if dynamic is not None:
        raise ConfigError(f"{path.name}: a Core ML package has fixed shapes: leave `dynamic` out")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, PQModule)}
    for name, layer in layers.items():
        if not layer.has_blocks:
            raise BGDError(
                f"{path.name}: layer {name!r} has codes of the form {layer.form.name!r}, which a Core ML package "
                "cannot decode: export the network as .onnx or .pt2, or quantize this layer with codes='blocks'"
            )
    tables = Tables()
    with _quiet():
        _convert(model, examples, tables).save(str(path))
        difference = read_back(path, {f"p_{name.replace('.', '_')}_codebook": m for name, m in layers.items()}, tables)
    if difference > _NEAR:
        raise BGDError(f"coremltools reads weights back that differ by {difference:.1e} of the largest one")
    return tuple(_notes(layers, tables, difference))


def read_back(path: Path, layers: dict[str, PQModule], tables: Tables) -> float:
    """The largest difference between a table of the package, decoded, and its layer's weight, relative to the weight.

    Args:
        path: the package.
        layers: by the name of the codebook in the program.
        tables: the pass that created the tables.

    Raises:
        BGDError: a table is missing in the package.
    """
    from coremltools.converters.mil.frontend.milproto.load import load
    from coremltools.models import MLModel
    from coremltools.optimize._utils import lut_to_dense

    package = MLModel(str(path), skip_model_load=True)
    spec = package.get_spec()
    program = load(spec, specification_version=spec.specificationVersion, file_weights_dir=package.weights_dir)
    decoded = {}
    for op in program.functions["main"].operations:
        if op.op_type == "constexpr_lut_to_dense":
            table = op.lut.val if op.lut.val is not None else op.lut.op.materialized_val_inference()
            decoded[op.outputs[0].name.removesuffix(_HALF)] = lut_to_dense(op.indices.val, table, op.vector_axis.val)
    worst = 0.0
    for codebook, value in tables.found.items():
        if value not in decoded or codebook not in layers:
            raise BGDError(f"the table of {codebook} is not in the package: it was folded or renamed")
        matrix = layers[codebook].matrix.detach().flatten(1).double()
        found = torch.from_numpy(numpy.asarray(decoded[value])).reshape(matrix.shape).double()
        worst = max(worst, float((found - matrix).abs().max() / matrix.abs().max()))
    return worst


def _convert(model: nn.Module, examples: Examples, tables: Tables) -> Any:
    import coremltools
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY

    unknown = get_decompositions([torch.ops.aten.addcmul])  # in frozen norms; coremltools does not support it
    program = captured(model, examples, None).run_decompositions(unknown)
    names = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    PASS_REGISTRY.passes[_PASS] = _Pass(tables)
    try:
        pipeline = coremltools.PassPipeline.DEFAULT
        pipeline.insert_pass(0, _PASS)
        return coremltools.convert(
            program,
            inputs=[
                coremltools.TensorType(name=name, shape=tuple(tensor.shape), dtype=_input_type(tensor))
                for name, tensor in zip(names, examples.tensors, strict=True)
            ],
            minimum_deployment_target=coremltools.target.iOS18,
            pass_pipeline=pipeline,
            compute_precision=coremltools.precision.FLOAT16,
            skip_model_load=True,
        )
    except Exception as error:  # a converter's own errors, of many types
        raise BGDError(f"coremltools {coremltools.__version__} cannot convert the network: {reason(error)}") from error
    finally:
        PASS_REGISTRY.passes.pop(_PASS, None)


def _input_type(tensor: torch.Tensor) -> Any:
    return numpy.float32 if tensor.is_floating_point() else numpy.int32


class _Pass:
    """A pass with the interface that coremltools requires."""

    minimum_deployment_target: Any = None

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def __call__(self, program: Any) -> None:
        self._tables(program)

    def __str__(self) -> str:
        return _PASS

    def set_options(self, options: Any) -> None:
        """Required by coremltools; this pass has no options."""


def _notes(layers: dict[str, PQModule], tables: Tables, difference: float) -> Iterator[str]:
    yield (
        f"{len(tables.found)} tables, read back by coremltools: largest difference {difference:.1e} of the largest "
        "weight; Core ML runs only on Apple's systems, so the package was not run here"
    )
    paths = {f"p_{name.replace('.', '_')}_codebook": name for name in layers}
    if tables.reshaped:
        names = ", ".join(paths.get(name, name) for name in tables.reshaped)
        yield f"a reshape follows the table; whether the Neural Engine supports it is unknown: {names}"
    left = [path for name, path in paths.items() if name not in tables.found]
    if left:
        yield f"stored without a table (more than 256 codewords, a mask, or an embedding): {', '.join(left)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the converter's progress bars and its warnings about versions."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
