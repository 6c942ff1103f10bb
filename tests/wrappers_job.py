"""What each of two processes of a test's job runs: quantized networks in torch's own wrappers, over gloo.

`tests.forked` starts `main`, with the variables in the environment that torchrun sets.
"""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import bgd_plugin as bgd
from bgd_plugin.integration import PQModule

SIZES = (512, 256, 16)  # codes of 9, 8 and 4 bits


def network(seed: int = 0) -> nn.Module:
    """Three quantized layers, with codes of all widths."""
    torch.manual_seed(seed)
    dims = (32, 256, 256, 256, 8)
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(dims)]
    parts = [part for layer in layers for part in (layer, nn.ReLU())]
    model = nn.Sequential(*parts[:-1])
    overrides = tuple((str(2 * i + 2), bgd.LayerConfig(block_size=4, codebook_size=k)) for i, k in enumerate(SIZES))
    result: nn.Module = bgd.quantize_weights(
        model, bgd.BGDConfig(overrides=overrides, em_iterations=2, max_divergence=None)
    ).model
    return result


def batch(rank: int) -> Tensor:
    """The data of one process."""
    return torch.randn(16, 32, generator=torch.Generator().manual_seed(rank))


def step(model: nn.Module, data: Tensor) -> None:
    """One step of training."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(data).square().mean().backward()
    optimizer.step()


def full(model: nn.Module) -> dict[str, Tensor]:
    """The whole state, on every process."""
    state = get_model_state_dict(model)
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() for k, v in state.items()}


def replicated(rank: int) -> dict[str, Tensor]:
    """DistributedDataParallel: what the first process has goes to all, codes included."""
    model = network()
    if rank:  # only the first process's numbers may count
        for layer in model.modules():
            if isinstance(layer, PQModule):
                layer.codes.zero_()
                nn.init.zeros_(layer.codebook)
    wrapped = nn.parallel.DistributedDataParallel(model)
    step(wrapped, batch(rank))
    return {k: v.clone() for k, v in model.state_dict().items()}


def sharded(rank: int, folder: Path) -> dict[str, Tensor]:
    """FSDP2, and a distributed checkpoint that is read into a network that is sharded in another way."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = network()
    for layer in list(model):  # type: ignore[call-overload]
        if isinstance(layer, PQModule):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    step(model, batch(rank))
    dcp.save(model.state_dict(), checkpoint_id=folder)
    other = copy.deepcopy(network(seed=1))
    fully_shard(other, mesh=mesh)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder)
    other.load_state_dict(state)
    found, wanted = full(other), full(model)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    return wanted


def main(name: str) -> None:
    """One process, which leaves its states in the folder."""
    folder = Path(name)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    try:
        torch.save(replicated(rank), folder / f"replicated-{rank}.pt")
        torch.save(sharded(rank, folder / "checkpoint"), folder / f"sharded-{rank}.pt")
    finally:
        dist.destroy_process_group()
