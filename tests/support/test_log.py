"""Seconds of a run, by step."""

from __future__ import annotations

import time

import pytest

from bgd_plugin.support.log import Log


def test_what_another_step_counts_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    now, forward = [100.0], [3.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    log = Log()
    with log.timed("fit"):
        now[0] += 5
    log.elsewhere = lambda: forward[0]
    with log.timed("statistics"):
        now[0] += 10
        forward[0] += 4
    log.add_seconds("forward", forward[0])
    assert log.seconds == {"fit": 5.0, "statistics": 6.0, "forward": 7.0}
