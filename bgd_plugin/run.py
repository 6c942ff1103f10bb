"""A run's progress on disk: each finished layer, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch
from bgd_plugin.checkpoint import write_atomically
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import CheckpointError
from bgd_plugin.fitting import FittedLayer
from bgd_plugin.plan import PlannedLayer

__all__ = ["Run", "digest"]

_DESCRIPTION = "run.json"


class Run:
    """The finished layers of one `quantize` call, in a folder; without a folder nothing is kept.

    A layer's file holds its codebook and codes as they were when the layer was done.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

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
            CheckpointError: the folder holds a run of another network, other settings, other calibration data or
                another teacher.
        """
        if folder is None:
            return cls(None)
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        description = {
            "config": config.to_dict(),
            "network": digest(model.state_dict().values()),
            "calibration": digest(t for b in batches for t in pytree.tree_leaves((b.args, b.kwargs))),
            "teacher": digest((teacher or model).state_dict().values()),
        }
        description = json.loads(json.dumps(description))
        file = path / _DESCRIPTION
        if file.exists():
            _require_same(path, _read(file), description)
        else:
            write_atomically(file, json.dumps(description, indent=2).encode())
        return cls(path)

    def finished(self, index: int, layer: PlannedLayer) -> FittedLayer | None:
        """Codebook and codes of a layer that an earlier call finished.

        Raises:
            CheckpointError: the layer's file is damaged.
        """
        file = self._file(index)
        if file is None or not file.exists():
            return None
        try:
            with safetensors.safe_open(str(file), framework="pt") as content:
                note = (content.metadata() or {}).get("note", "")
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
                note=note,
            )
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{file} is damaged ({error}): delete it, the layer will be fitted again") from error

    def store(self, index: int, fit: FittedLayer) -> None:
        """Keep a finished layer."""
        file = self._file(index)
        if file is not None:
            values = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit)}
            tensors = {k: v.detach().cpu().contiguous() for k, v in values.items() if isinstance(v, Tensor)}
            write_atomically(file, safetensors.torch.save(tensors, metadata={"note": fit.note}))

    def _file(self, index: int) -> Path | None:
        return None if self.folder is None else self.folder / f"layer-{index:04d}.safetensors"


def _read(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged ({error}): begin again in an empty folder") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: begin again in an empty folder")
    return found


def _require_same(folder: Path, found: dict[str, object], wanted: dict[str, object]) -> None:
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise CheckpointError(
            f"{folder} holds a run with another {' and another '.join(different)}: "
            "give the same as then, or an empty folder"
        )


def digest(values: object) -> str:
    """A fingerprint of tensors, and of how they print for anything else."""
    digest = hashlib.sha256()
    for value in values:  # type: ignore[attr-defined]
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
            digest.update(str(value.item()).encode() if value.ndim == 0 else b"")
        else:
            digest.update(repr(value).encode())
    return digest.hexdigest()
