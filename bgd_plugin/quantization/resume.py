"""A run's progress on disk, so that a run that was stopped goes on where it was and ends in the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import CheckpointError
from bgd_plugin.fitting import FittedLayer
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.quantization.fingerprint import described, differing
from bgd_plugin.support.atomic import remove, remove_leftovers, write_atomically
from bgd_plugin.support.processes import largest
from bgd_plugin.support.steps import Steps

__all__ = ["Run", "holds_run", "stage"]

_DESCRIPTION = "run.json"


class Run:
    """The progress of one `quantize` call, in a folder; without a folder nothing is kept.

    Of several processes, the first one has the folder; all make their runs together.

    A layer's file holds its codebook and codes as they were when the layer was done. A stage of training keeps a file
    of its own while it goes on.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._is_kept = bool(largest(folder is not None))

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        model: nn.Module,
        config: BGDConfig,
        batches: Sequence[Batch],
        teacher: nn.Module | None = None,
    ) -> Run:
        """Begin a run, or go on with the one in `folder`.

        Raises:
            CheckpointError: the folder holds a run of another version, another network, other settings, other
                calibration data or another teacher; every difference is named. Or it cannot be made.
        """
        if folder is None:
            return cls(None)
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {path} cannot be made ({error.strerror}): give another"
            ) from error
        remove_leftovers(path)
        wanted = described(model, config, batches, teacher or model)
        file = path / _DESCRIPTION
        if file.exists():
            _require_same(path, _read(file), wanted)
        else:
            write_atomically(file, json.dumps(wanted, indent=2).encode())
        return cls(path)

    def steps(self, name: str, on_steps: Callable[[int], object], *, is_shared: bool = True) -> Steps:
        """The gradient steps of the stage with that name.

        Args:
            is_shared: of several processes, all take them together; else only the first one takes them.
        """
        return Steps(self._steps_file(name), on_steps, is_shared=is_shared and self._is_kept)

    @contextmanager
    def says_how_to_go_on(self) -> Iterator[None]:
        """Add to a Ctrl-C that comes inside what is kept of the run, and how it goes on."""
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.add_note(
                f"the same call goes on from what {self.folder} holds"
                if self.folder
                else 'nothing was kept; with checkpoint="FOLDER" the same call would go on from there'
            )
            raise

    def finished(self, index: int, layer: PlannedLayer) -> FittedLayer | None:
        """Codebook and codes of a layer that an earlier call finished.

        Raises:
            CheckpointError: the layer's file is damaged.
        """
        file = self._file(index)
        if file is None or not file.exists():
            return None
        self._forget_steps(index)  # it may have been killed between the two
        try:
            with safetensors.safe_open(str(file), framework="pt") as content:
                warnings = json.loads((content.metadata() or {}).get("warnings", "[]"))
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            found = list(tensors["codebook"].shape), list(tensors["codes"].shape)
            wanted = [layer.codebook_size, layer.block_size], [layer.rows, layer.blocks_per_row]
            if found != wanted:
                raise ValueError(f"shapes {found}, expected {wanted}")
            return FittedLayer(
                codebook=tensors["codebook"],
                codes=tensors["codes"],
                row_scale=tensors.get("row_scale"),
                bias_shift=tensors.get("bias_shift"),
                warnings=tuple(map(str, warnings)),
            )
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): delete it, the layer will be fitted again") from error

    def store(self, index: int, fit: FittedLayer) -> None:
        """Keep a finished layer."""
        file = self._file(index)
        if file is not None:
            values = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit)}
            tensors = {k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
            write_atomically(file, safetensors.torch.save(tensors, metadata={"warnings": json.dumps(fit.warnings)}))
            self._forget_steps(index)

    def _forget_steps(self, index: int) -> None:
        file = self._steps_file(stage(index))
        if file is not None:
            remove(file)

    def _steps_file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.steps.safetensors"

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"{stage(index)}.safetensors"


def stage(index: int) -> str:
    """The name of a layer's stage of training."""
    return f"layer-{index:04d}"


def holds_run(folder: Path) -> bool:
    """Whether a run was begun in the folder."""
    return (folder / _DESCRIPTION).is_file()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): begin again in an empty folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: begin again in an empty folder")
    return found


def _require_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = list(differing(found, wanted))
    if differences:
        raise CheckpointError(
            f"{folder} holds a run with another {', another '.join(differences)}: give the same as then, or an empty "
            "folder"
        )
