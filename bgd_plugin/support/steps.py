"""Gradient steps that resume bit for bit where a run was stopped.

Processes that train together save together: the first one writes its own state, and whatever differs in the others,
such as the position in the data or batch-norm statistics.
"""

from __future__ import annotations

import hashlib
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
from bgd_plugin.support.atomic import write_atomically
from bgd_plugin.support.processes import from_all, from_first, is_first, largest, processes, rank

__all__ = ["Part", "Stateful", "Steps"]

SAVE_SECONDS = 30.0
"""Minimum time between two saves; longer if saving is slow, so that it takes a small share of the run."""
_SHARE = 0.05
_KEY = "bgd_plugin.steps"


class Stateful(Protocol):
    """Anything with a state dict: a module, an optimizer, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """The state: tensors and plain values."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Restore the state from a `state_dict`, in place."""
        ...


Part: TypeAlias = Stateful | torch.Generator | list[Any]


class Steps:
    """The steps of one training stage; with a file, progress is saved there.

    A stage loops over `steps.run(total, layer=layer, optimizer=optimizer, generator=generator, losses=losses)`: all
    state that changes from step to step is passed there, and is restored before the first step of a resumed run.

    Args:
        file: where progress is saved; its folder must exist. None: progress is not saved.
        on_steps: called with the number of steps done: 1 after each step, and at first those of an earlier run.
        is_shared: all processes take the steps together; the first one has the file. Progress saved with another
            number of processes is ignored: the stage starts again.
    """

    def __init__(
        self,
        file: Path | None = None,
        on_steps: Callable[[int], object] = lambda count: None,
        *,
        is_shared: bool = False,
    ) -> None:
        self.file = file
        self.on_steps = on_steps
        self._is_shared = is_shared and processes() > 1

    def run(self, total: int, **parts: Part) -> Iterator[int]:
        """Yield the indices of the remaining steps; the state of `parts` is saved between steps and at the end.

        Args:
            total: number of steps of the stage.
            parts: what to save and restore, by name.

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
            if self._wants_save(start >= due) or (step + 1 == total and self._keeps):
                self._save(step + 1, parts)
                now = time.monotonic()
                due = now + max(SAVE_SECONDS, (now - start) / _SHARE)

    @property
    def _keeps(self) -> bool:
        return self._is_shared or self.file is not None

    def _wants_save(self, is_due: bool) -> bool:
        """Whether to save now, according to the first process's clock."""
        is_due = is_due and self.file is not None
        return bool(largest(is_due)) if self._is_shared else is_due

    def _save(self, step: int, parts: Mapping[str, Part]) -> None:
        tensors: dict[str, Tensor] = {}
        plain = {name: _plain(_state(part), tensors) for name, part in parts.items()}
        kept = {"step": step, "parts": plain, "others": _of_others(plain, tensors) if self._is_shared else []}
        if self.file is not None:
            write_atomically(self.file, safetensors.torch.save(tensors, {_KEY: json.dumps(kept)}))

    def _restore(self, total: int, parts: Mapping[str, Part]) -> int:
        """Restore each part; returns the number of steps already done."""
        tensors, text = from_first(self._read) if self._is_shared else self._read()
        if not text:
            return 0
        try:
            kept = json.loads(text)
            step, states = kept["step"], kept["parts"]
            if not isinstance(step, int) or not 0 < step <= total or set(states) != set(parts):
                raise ValueError(f"step {step} of {total}, parts {', '.join(states)}")
            if len(kept["others"]) + 1 != (processes() if self._is_shared else 1):
                return 0
            if self._is_shared and not is_first():
                states = kept["others"][rank() - 1]
                own = {name: f"{rank()}/{name}" for name in tensors if f"{rank()}/{name}" in tensors}
                tensors |= {name: tensors[place] for name, place in own.items()}
            for name, part in parts.items():
                _restore_(part, _restored(states[name], tensors))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise self._damaged(error) from error
        return step

    def _read(self) -> tuple[dict[str, Tensor], str]:
        """Tensors and text of the file; an empty text if there is no file."""
        if self.file is None or not self.file.exists():
            return {}, ""
        try:
            with safetensors.safe_open(str(self.file), framework="pt") as content:
                text = (content.metadata() or {})[_KEY]
                return {name: content.get_tensor(name) for name in content.keys()}, text  # noqa: SIM118 (no mapping)
        except (safetensors.SafetensorError, KeyError) as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        file = self.file or "the first process's progress file of this stage"
        return CheckpointError(f"{file} is damaged ({error}): delete it to start this stage again")


def _of_others(plain: dict[str, Any], tensors: dict[str, Tensor]) -> list[Any]:
    """The other processes' plain states, in the first process; tensors that differ are added to its `tensors`."""
    digests = {name: hashlib.sha256(_raw(tensor)).hexdigest() for name, tensor in tensors.items()}
    of_first = json.loads(from_first(lambda: ({}, json.dumps(digests)))[1])
    content = b""
    if not is_first():
        own = {name: tensor for name, tensor in tensors.items() if digests[name] != of_first.get(name)}
        content = safetensors.torch.save(own, {"plain": json.dumps(plain)})
    states = []
    for number, sent in enumerate(from_all(content)):
        if number and is_first():
            header = json.loads(sent[8 : 8 + int.from_bytes(sent[:8], "little")])
            states.append(json.loads(header["__metadata__"]["plain"]))
            tensors.update({f"{number}/{name}": tensor for name, tensor in safetensors.torch.load(sent).items()})
    return states


def _raw(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


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
    """The value as JSON; tensors are copied to `tensors` and replaced by their names. JSON keeps floats exactly."""
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
    raise CheckpointError(f"the state of a training stage holds a {type(value).__name__}, which cannot be saved")


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
