"""What several processes share, seen from one that is told that it is the first of two."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bgd_plugin.support import processes


def test_sums_inside_what_the_first_process_does_alone_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second process is waiting for the result: whoever asks it for a sum waits for ever."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_backend", lambda: "gloo")
    asked = []
    monkeypatch.setattr(processes, "finish", asked.append)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, *_, **__: "sum")
    monkeypatch.setattr(dist, "broadcast", lambda tensor, *_, **__: "broadcast")

    def work() -> tuple[dict[str, torch.Tensor], str]:
        counted = processes.total(3.0), processes.largest(4), len(processes.from_all(b"one")), processes.processes()
        assert not asked
        return {"found": torch.ones(2)}, str(counted)

    tensors, text = processes.from_first(work)
    assert text == "(3.0, 4, 1, 1)" and tensors["found"].tolist() == [1, 1]
    assert asked == ["broadcast"] * 2
    processes.total(3.0)
    assert asked[-1] == "sum"
