"""The dense way out: ExecuTorch's own exporter, on ordinary layers, with XNNPACK taking their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import bgd_plugin as bgd
from tests.networks import SmallResNet, em, images, randomized


def test_a_materialized_graph_keeps_no_trace_of_other_classes() -> None:
    traced = torch.fx.symbolic_trace(randomized(SmallResNet()))
    network = bgd.quantize(traced, images(), em(), progress=False).model
    assert isinstance(network, torch.fx.GraphModule)
    dense = bgd.materialize(network)
    assert isinstance(dense, torch.fx.GraphModule)
    assert not any("nn_module_stack" in node.meta for node in dense.graph.nodes)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # ExecuTorch has many things to say
def test_executorch_runs_the_dense_network(tmp_path: Path) -> None:
    exir = pytest.importorskip("executorch.exir", reason="executorch is not installed")
    runtime = pytest.importorskip("executorch.runtime", reason="executorch is not installed")
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    data = images()
    network = bgd.quantize(randomized(SmallResNet()), data, em(), progress=False).model
    program = torch.export.export(bgd.materialize(network), (data[0],))
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (tmp_path / "net.pte").write_bytes(lowered.buffer)
    method = runtime.Runtime.get().load_program(tmp_path / "net.pte").load_method("forward")
    assert torch.allclose(method.execute([data[0]])[0], network(data[0]), atol=1e-5)
