"""On which samples a run is judged, and that all processes take the same kind."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin.calibration import Batch
from bgd_plugin.quantization import judge
from bgd_plugin.support.log import Log


@pytest.mark.parametrize(
    ("own", "others", "finetuning", "is_aside", "samples"),
    [(2, 2, None, True, 2), (0, 0, None, False, 32), (2, 0, None, False, 32), (2, 2, "yes", False, 2)],
)
def test_samples_kept_aside_judge_where_every_process_has_some(
    own: int, others: int, finetuning: Any, is_aside: bool, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}

    def compared(student: Any, reference: Any, batches: Any, **fields: Any) -> str:
        student(batches[0]), reference(batches[0])
        given.update(fields, samples=sum(batch.size for batch in batches))
        return "answers"

    monkeypatch.setattr(judge, "compare_answers", compared)
    monkeypatch.setattr(judge, "largest", lambda number: max(number, -others))
    student, modes = nn.Sequential(nn.Linear(3, 3)).train(), list[bool]()
    student[0].register_forward_hook(lambda module, *_: modes.append(module.training))
    job: Any = SimpleNamespace(
        aside=[Batch((torch.ones(1, 3),))] * own,
        batches=[Batch((torch.ones(10, 3),))] * 9,
        student=student,
        reference=nn.Linear(3, 3),
        config=SimpleNamespace(finetuning=finetuning),
        log=Log(),
    )
    assert judge.judged(job, "measure") == "answers"  # type: ignore[arg-type, comparison-overlap]
    tokens = 2048 if samples == 32 else math.inf
    assert given == {"kept_aside": is_aside, "measure": "measure", "samples": samples, "enough_tokens": tokens}
    assert modes == [False] and student.training and "answers" in job.log.seconds
