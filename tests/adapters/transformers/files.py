"""What a safetensors file says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["content"]


def content(path: Path) -> tuple[Any, bytes]:
    """Header and bytes of a file; safetensors writes the header's metadata in any order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]
