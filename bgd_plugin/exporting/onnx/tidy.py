"""Remove from an exported graph what only takes bytes: stack traces, shapes, long names, biases of zero."""

from __future__ import annotations

from typing import Any

import numpy

__all__ = ["simplify_", "strip_"]

_SMALL = 64
"""Maximum number of items in a tensor that is folded: shapes and axes, never a weight."""


def simplify_(model: Any) -> None:
    """Fold shapes that the graph computes from constants, and drop biases of zero, in place.

    No weight is folded: only tensors of at most 64 items are.

    Args:
        model: `onnx_ir.Model`.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer

    for node in model.graph:
        if node.op_type in ("Conv", "ConvTranspose") and len(node.inputs) > 2 and _is_zero(node.inputs[2]):
            node.resize_inputs(2)
    optimizer.fold_constants(
        model,
        input_size_limit=_SMALL,
        output_size_limit=_SMALL,
        should_fold=lambda node: None if _is_small(node) else False,
    )
    for one in (
        common.IdentityEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(size_limit=_SMALL),
        common.DeduplicateInitializersPass(size_limit=_SMALL),
        common.RemoveUnusedNodesPass(),
    ):
        one(model)


def strip_(model: Any) -> None:
    """Remove metadata and the types of inner values of an `onnx_ir.Model`, and shorten inner names, in place."""
    graph = model.graph
    model.metadata_props.clear()
    graph.metadata_props.clear()
    kept = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    number = 0
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if any(output is one for one in graph.outputs):
                continue
            output.type = output.shape = None
            if output.name and output.name not in kept:
                output.name = f"{number}"
                number += 1
        node.name = node.outputs[0].name
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None


def _is_small(node: Any) -> bool:
    """Whether a node reads no large tensor; the optimizer would fold some operators of any size."""
    tensors = (value.const_value for value in node.inputs if value is not None and value.is_initializer())
    return all(tensor is None or tensor.size <= _SMALL for tensor in tensors)


def _is_zero(value: Any) -> bool:
    """Whether a value is zeros expanded to the number of channels."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Expand", "CastLike", "Cast"):
        value = node.inputs[0]
        node = value.producer()
    if node is not None and node.op_type == "Constant":
        found = node.attributes.get("value")
        return found is not None and not numpy.any(found.value.numpy())
    return False
