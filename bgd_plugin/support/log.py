"""What a run says of itself besides its layers: the seconds of each step, and notes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Log"]


class Log:
    """Seconds and notes of one run, in the order in which they came.

    Attributes:
        seconds: wall-clock seconds by step.
        notes: sentences for the report.
        elsewhere: seconds so far that another step will count; what passes of them during a step is not this step's.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.notes: list[str] = []
        self.elsewhere: Callable[[], float] = lambda: 0.0

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of a block to a step's."""
        start = time.perf_counter() - self.elsewhere()
        yield
        self.add_seconds(step, time.perf_counter() - self.elsewhere() - start)

    def add_seconds(self, step: str, seconds: float) -> None:
        """Add to the seconds of a step."""
        self.seconds[step] = self.seconds.get(step, 0.0) + seconds

    def note(self, *sentences: str) -> None:
        """Add sentences to the notes."""
        self.notes.extend(sentences)
