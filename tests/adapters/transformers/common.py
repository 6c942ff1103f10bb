"""What the tests of the transformers adapter share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bgd_plugin as bgd
from tests.adapters.transformers.zoo import ZOO

__all__ = ["EMBEDDING", "in_a_fresh_process", "loaded", "quantized", "saved"]

ROOT = Path(__file__).resolve().parents[3]
EMBEDDING: dict[str, Any] = {"embedding": {"block_size": 4, "codebook_size": 16}}
_FAST: dict[str, Any] = {"rounds": 0, "em_iterations": 5, "max_divergence": None}


def quantized(name: str, **settings: Any) -> Any:
    """A quantized model of the zoo."""
    adapter: Any = bgd.load_adapter("transformers")
    entry = ZOO[name]
    config = adapter.BGDQuantizationConfig(**_FAST | settings)
    return adapter.quantize_pretrained(entry.build(), [entry.batch(1), entry.batch(2)], config, progress=False).model


def saved(name: str, folder: Path, **settings: Any) -> Any:
    """The same, saved in a folder, and returned."""
    model = quantized(name, **settings)
    model.save_pretrained(folder)
    return model


def loaded(kind: Any, folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """A model, and what transformers says of the names that it found."""
    model, info = kind.from_pretrained(folder, output_loading_info=True, **options)
    return model, info


def in_a_fresh_process(script: str, folder: Path) -> None:
    """Run a script that finds the project's packages; its errors are the test's."""
    paths = [str(ROOT), str(ROOT / "adapters")]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{script}"],
        cwd=folder,
        env=os.environ | {"BGD_KERNELS": "off"},  # the plain path gives the same bits in every process
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
