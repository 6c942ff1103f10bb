"""Quantized networks in DistributedDataParallel, FSDP2, distributed checkpoints, accelerate and Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from tests import wrappers_job
from tests.forked import exit_codes, forked
from tests.wrappers_job import batch, network, step

# One worker of pytest-xdist runs them: the job runs once, forked from the process of the other jobs.
pytestmark = pytest.mark.xdist_group("processes")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes over gloo have filled."""
    folder = tmp_path_factory.mktemp("job")
    assert exit_codes(forked(wrappers_job.main, str(folder))) == [0, 0]
    return folder


@pytest.mark.parametrize("wrapper", ["replicated", "sharded"])
def test_all_processes_have_the_same_codes_and_codebooks(wrapper: str, job: Path) -> None:
    states: list[dict[str, Tensor]] = [torch.load(job / f"{wrapper}-{rank}.pt") for rank in range(2)]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())
    before = network().state_dict()
    assert all(torch.equal(states[0][name], before[name]) for name in before if name.endswith("codes"))
    assert not any(torch.equal(states[0][name], before[name]) for name in before if name.endswith("codebook"))


def test_a_step_of_two_processes_is_that_of_one_with_all_data(job: Path) -> None:
    model = network()
    step(model, torch.cat([batch(0), batch(1)]))
    for wrapper in ("replicated", "sharded"):
        state = torch.load(job / f"{wrapper}-0.pt")
        assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_sharded_checkpoint_is_read_by_one_process(job: Path) -> None:
    model = network(seed=1)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=job / "checkpoint", no_dist=True)
    wanted = torch.load(job / "sharded-0.pt")
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_every_buffer_can_be_broadcast(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        for buffer in network().buffers():
            dist.broadcast(buffer, 0)
    finally:
        dist.destroy_process_group()


def test_states_of_before_with_16_bit_codes_are_read() -> None:
    model, other = network(), network(seed=1)
    state = {k: v.to(torch.int16) if v.dtype == torch.int32 else v for k, v in model.state_dict().items()}
    assert any(v.dtype == torch.int16 for v in state.values())
    other.load_state_dict(state, assign=True)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert all(a.dtype == b.dtype for a, b in zip(model.buffers(), other.buffers(), strict=True))


def test_accelerate(tmp_path: Path) -> None:
    accelerate: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*(lambda m: (m, torch.optim.SGD(m.parameters(), lr=0.1)))(network()))
    accelerator.backward(model(batch(0)).square().mean())
    optimizer.step()
    accelerator.save_state(str(tmp_path))
    wanted = {k: v.clone() for k, v in accelerator.unwrap_model(model).state_dict().items()}
    nn.init.zeros_(next(model.parameters()))
    accelerator.load_state(str(tmp_path))
    found = accelerator.unwrap_model(model).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
