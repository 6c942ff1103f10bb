"""Unpacking by nodes of the graph gives what unpacking by `encoding` gives, for every width and every form of mask."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from bgd_plugin.encoding.codes import pack
from bgd_plugin.encoding.masks import mask_form, pack_mask
from bgd_plugin.exporting.onnx.nodes import Nodes
from bgd_plugin.exporting.onnx.unpack import unpacked_codes, unpacked_mask

onnx_ir: Any = pytest.importorskip("onnx_ir", reason="the extra onnx is not installed")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


def _value(build: Any) -> Any:
    """What onnxruntime gives, as int64, for the value that `build(nodes)` returns, in a graph without inputs."""
    graph = onnx_ir.Graph([], [], nodes=[], opset_imports={"": 20}, name="graph")
    nodes = Nodes(graph)
    result = nodes.cast(build(nodes), numpy.int64)
    nodes.insert_()
    result.type = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    graph.outputs.append(result)
    content = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    return onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"]).run(None, {})[0]


@pytest.mark.parametrize("bits", range(1, 17))
@pytest.mark.parametrize("shape", [(8, 4), (7, 3), (1, 1)])
def test_codes(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(1 << bits, shape)
    codes.view(-1)[-1] = (1 << bits) - 1
    dtype = numpy.uint8 if bits <= 8 else numpy.int16 if bits < 16 else numpy.int32
    found = _value(lambda nodes: unpacked_codes(nodes, "codes", pack(codes, bits).numpy(), bits, shape, dtype))
    assert numpy.array_equal(found, codes.numpy())


def _mask(form: str) -> Tensor:
    mask = torch.ones(8, 16, 2, 2, dtype=torch.bool)
    if form == "lines":
        mask[3], mask[:, 5] = False, False
    elif form == "positions":
        mask[2, 7, 1, 0] = mask[7, 15, 1, 1] = False
    elif form == "bits":
        mask = torch.rand(mask.shape) > 0.4
    else:
        kept, size = (int(part) for part in form.split()[0].split(":"))
        along = (8, 2, 2, 16) if form.endswith("channels") else (8, 64)
        groups = torch.rand(along).reshape(-1, size).argsort(1) < kept
        mask = groups.reshape(along)
        mask = mask.movedim(-1, 1) if form.endswith("channels") else mask.reshape(8, 16, 2, 2)
    return mask.contiguous()


@pytest.mark.parametrize(
    "form", ["bits", "positions", "lines", "2:4", "1:2", "3:8", "4:16", "2:4 channels", "5:8 channels"]
)
def test_masks(form: str) -> None:
    mask = _mask(form)
    assert mask_form(mask) == form
    packed = pack_mask(mask, form).numpy()
    found = _value(lambda nodes: unpacked_mask(nodes, "mask", packed, form, tuple(mask.shape)))
    assert numpy.array_equal(found, mask.numpy())
