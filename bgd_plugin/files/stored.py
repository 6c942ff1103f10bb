"""The content of a file: tensors in their stored form, and a header."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Stored"]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """The content of a file.

    Attributes:
        tensors: by name, in their stored form; on the meta device if only sizes are needed.
        header: plain JSON values.
        columns: the codes in a row of each tensor of packed codes, by name; what a file that was read does not say.
        streams: names of tensors that stand for streams which are yet to be, on the meta device.
    """

    tensors: dict[str, Tensor]
    header: dict[str, Any]
    columns: dict[str, int] = field(default_factory=dict)
    streams: tuple[str, ...] = ()
