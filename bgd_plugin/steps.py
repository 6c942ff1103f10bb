"""Gradient steps that a stopped run takes up again where it was, to the bit."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from bgd_plugin.errors import CheckpointError
from bgd_plugin.files import remove, write_atomically

__all__ = ["Part", "Stateful", "Steps"]

SAVE_SECONDS = 30.0
"""Time between two saves, at least; where saving is slow it grows, so that saving takes a small share of the run."""
_SHARE = 0.05
_KEY = "bgd_plugin.steps"


class Stateful(Protocol):
    """A module, an optimizer, a schedule: anything that gives its state and takes it back."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Take them back, in place."""
        ...


Part: TypeAlias = Stateful | torch.Generator | list[Any]


class Steps:
    """The steps of one stage of training. With a file their progress is kept there; without one nothing is kept.

    A stage walks `for _ in steps.run(total, layer=layer, optimizer=optimizer, generator=generator, losses=losses)`:
    whatever changes from step to step is named there, and is restored before the first step of a resumed run.

    Args:
        file: where progress is kept; the folder is there.
        on_steps: called with the number of steps that are done, one by one, or all that an earlier call did.
    """

    def __init__(self, file: Path | None = None, on_steps: Callable[[int], object] = lambda count: None) -> None:
        self.file = file
        self.on_steps = on_steps

    def run(self, total: int, **parts: Part) -> Iterator[int]:
        """The numbers of the steps still to do; what is in `parts` is saved between two of them, and at the end.

        Raises:
            CheckpointError: the file is damaged, or cannot be written.
        """
        first = self._restore(total, parts)
        if first:
            self.on_steps(first)
        due = time.monotonic() + SAVE_SECONDS
        for step in range(first, total):
            yield step
            self.on_steps(1)
            start = time.monotonic()
            if self.file is not None and (start >= due or step + 1 == total):
                self._save(step + 1, parts)
                now = time.monotonic()
                due = now + max(SAVE_SECONDS, (now - start) / _SHARE)

    def forget(self) -> None:
        """The stage is over, and its result kept elsewhere."""
        if self.file is not None:
            remove(self.file)

    def _save(self, step: int, parts: Mapping[str, Part]) -> None:
        assert self.file is not None
        tensors: dict[str, Tensor] = {}
        plain = {name: _plain(_state(part), tensors) for name, part in parts.items()}
        metadata = {_KEY: json.dumps({"step": step, "parts": plain})}
        write_atomically(self.file, safetensors.torch.save(tensors, metadata))

    def _restore(self, total: int, parts: Mapping[str, Part]) -> int:
        """Give each part its state back; returns the number of steps that are done."""
        if self.file is None or not self.file.exists():
            return 0
        try:
            with safetensors.safe_open(str(self.file), framework="pt") as content:
                kept = json.loads((content.metadata() or {})[_KEY])
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            step, states = kept["step"], kept["parts"]
            if not isinstance(step, int) or not 0 < step <= total or set(states) != set(parts):
                raise ValueError(f"step {step} of {total}, parts {', '.join(states)}")
            for name, part in parts.items():
                _restore_(part, _restored(states[name], tensors))
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{self.file} is damaged ({error}): delete it, this stage then begins again"
            ) from error
        return step


def _state(part: Part) -> Any:
    if isinstance(part, torch.Generator):
        return part.get_state()
    return list(part) if isinstance(part, list) else part.state_dict()


def _restore_(part: Part, state: Any) -> None:
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, list):
        part[:] = state
    else:
        part.load_state_dict(state)


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON; its tensors go to `tensors`, copied, and leave their names. JSON keeps floats to the bit."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[_plain(k, tensors), _plain(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_plain(v, tensors) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise CheckpointError(f"a {type(value).__name__} in the state of a stage of training cannot be kept")


def _restored(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_restored(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(_restored(v, tensors) for v in content)
    if kind == "mapping":
        return {_restored(k, tensors): _restored(v, tensors) for k, v in content}
    raise ValueError(f"unknown kind {kind!r}")
