"""A run's progress on disk: a stopped run resumes where it was, and produces the same bytes."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from bgd_plugin.pq.forms import FORMS
from bgd_plugin.quantization.fingerprint import described, differing
from bgd_plugin.support.atomic import remove, remove_leftovers, write_atomically
from bgd_plugin.support.processes import largest
from bgd_plugin.support.steps import Steps

__all__ = ["Fits", "Run", "holds_run", "stage"]

_DESCRIPTION = "run.json"


Fits = Mapping[str, tuple[PlannedLayer, FittedLayer]]
"""What was fitted, and as what, by layer name."""


class Run:
    """The progress of one `quantize` call, saved in a folder; without a folder nothing is saved.

    With several processes, the first one has the folder; all create their runs together.

    A layer's file contains its codebook and codes at the time it was finished. A training stage has its own file while
    it runs.
    """

    def __init__(self, folder: Path | None, known: Fits | None = None) -> None:
        self.folder = folder
        self.fits: dict[str, tuple[PlannedLayer, FittedLayer]] = {}
        self._known = known or {}
        self._is_kept = bool(largest(folder is not None))

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike[str] | None,
        model: nn.Module,
        config: BGDConfig,
        batches: Sequence[Batch],
        teacher: nn.Module | None = None,
        known: Fits | None = None,
    ) -> Run:
        """Start a run, or resume the one in `folder`.

        Args:
            folder: for progress; None: nothing is saved.
            model: the float network.
            config: the settings.
            batches: the calibration data.
            teacher: the network whose logits training matches, if it is not the float one.
            known: what an earlier pass over the sizes has fitted, by layer name; taken for layers of the same sizes.

        Raises:
            CheckpointError: the folder contains a run with another version, network, settings, calibration data or
                teacher (the message names every difference), or it cannot be created.
        """
        if folder is None:
            return cls(None, known)
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint folder {path} cannot be created ({error.strerror}): give another folder"
            ) from error
        remove_leftovers(path)
        wanted = described(model, config, batches, teacher or model)
        file = path / _DESCRIPTION
        if file.exists():
            _require_same(path, _read(file), wanted)
        else:
            write_atomically(file, json.dumps(wanted, indent=2).encode())
        return cls(path, known)

    def steps(self, name: str, on_steps: Callable[[int], object], *, is_shared: bool = True) -> Steps:
        """The gradient steps of the stage with this name.

        Args:
            name: of the stage; its file has the same name.
            on_steps: called with the number of steps done since the last call.
            is_shared: whether all processes take the steps together; otherwise only the first one does.
        """
        return Steps(self._steps_file(name), on_steps, is_shared=is_shared and self._is_kept)

    @contextmanager
    def says_how_to_go_on(self) -> Iterator[None]:
        """Add a note to a Ctrl-C inside this context: what is saved, and how to resume."""
        try:
            yield
        except KeyboardInterrupt as stop:
            stop.add_note(
                f"progress is saved in {self.folder}; the same call resumes there"
                if self.folder
                else 'no progress saved; pass checkpoint="FOLDER" to be able to resume'
            )
            raise

    def finished(self, index: int, layer: PlannedLayer) -> FittedLayer | None:
        """Codebook and codes of the layer at this index, if an earlier call or an earlier pass finished it.

        Raises:
            CheckpointError: the layer's file is damaged.
        """
        file = self._file(index)
        if file is not None and file.exists():
            fit: FittedLayer | None = self._saved(index, file, layer)
        else:
            before = self._known.get(layer.name)
            fit = before[1] if before is not None and _sizes(before[0]) == _sizes(layer) else None
        if fit is not None:
            self.fits[layer.name] = layer, fit
        return fit

    def _saved(self, index: int, file: Path, layer: PlannedLayer) -> FittedLayer:
        self._forget_steps(index)  # a run killed between saving the layer and this leaves them behind
        try:
            with safetensors.safe_open(str(file), framework="pt") as content:
                warnings = json.loads((content.metadata() or {}).get("warnings", "[]"))
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
            found = list(tensors["codebook"].shape), list(tensors["codes"].shape)
            size = found[0][0] if layer.codes == "entropy" else layer.codebook_size  # as many levels as the fit found
            form, sizes = FORMS[layer.form], layer.sizes(size)
            wanted = list(form.codebook_shape(sizes)), list(form.codes_shape(sizes))
            if found != wanted:
                raise ValueError(f"shapes {found}, expected {wanted}")
            return FittedLayer(
                codebook=tensors["codebook"],
                codes=tensors["codes"],
                row_scale=tensors.get("row_scale"),
                bias_shift=tensors.get("bias_shift"),
                warnings=tuple(map(str, warnings)),
                form=layer.form,
            )
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): delete it to fit the layer again") from error

    def forget_fits(self) -> None:
        """Fit every layer again, whatever its sizes were in the pass before."""
        self._known = {}

    def store(self, index: int, layer: PlannedLayer, fit: FittedLayer) -> None:
        """Save the finished layer at this index."""
        self.fits[layer.name] = layer, fit
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


def _sizes(layer: PlannedLayer) -> tuple[int, int, str, int]:
    """What a fit depends on besides the network and the data."""
    return layer.block_size, layer.codebook_size, layer.codes, layer.size_bytes


def stage(index: int) -> str:
    """The name of the training stage of the layer at this index."""
    return f"layer-{index:04d}"


def holds_run(folder: Path) -> bool:
    """Whether the folder contains a run."""
    return (folder / _DESCRIPTION).is_file()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): start again in an empty folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: start again in an empty folder")
    return found


def _require_same(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    differences = list(differing(found, wanted))
    if differences:
        raise CheckpointError(
            f"{folder} contains a run with another {', another '.join(differences)}: give the same, or an empty folder"
        )
