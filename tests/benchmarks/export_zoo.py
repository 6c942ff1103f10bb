"""Torchvision classifiers, ten timm models and twelve of transformers through `export` to ONNX: agrees, or why not.

Run `python -m tests.benchmarks.export_zoo`; `--only GLOB` takes some. Weights are random; layers are quantized without
data, since a file's answers are compared with those of the very network that is exported. Models above 100 M
parameters are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bgd_plugin as bgd
from tests.benchmarks import zoo

__all__ = ["main", "run"]

_LARGE = 100_000_000
_TIMM = (
    "convnext_atto",
    "deit_tiny_patch16_224",
    "efficientformerv2_s0",
    "ghostnet_100",
    "hrnet_w18_small",
    "levit_128s",
    "mobilenetv4_conv_small",
    "repvgg_a0",
    "resmlp_12_224",
    "swin_tiny_patch4_window7_224",
)
_TEXT: dict[str, dict[str, Any]] = {
    "Albert": {"hidden_size": 64, "embedding_size": 32, "num_attention_heads": 4, "intermediate_size": 128},
    "Bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "DistilBert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128},
    "Electra": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "Roberta": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "GPTNeoX": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "use_cache": False,
    },
    "Llama": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "use_cache": False,
    },
}
_VISION: dict[str, dict[str, Any]] = {
    "ConvNext": {"hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 2, 1]},
    "DeiT": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "MobileViT": {},
    "ResNet": {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [1, 1, 1, 1]},
    "ViT": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
}
Case = tuple[nn.Module, Any]


def _torchvision(name: str) -> Case:
    return zoo.build("classification", name), zoo.inputs("classification", name)


def _timm(name: str) -> Case:
    import timm

    model = timm.create_model(name, pretrained=False)
    return model, torch.rand(2, *timm.data.resolve_model_data_config(model)["input_size"])


def _text(name: str) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=1000, **_TEXT[name])
    tokens = torch.randint(3, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
    return getattr(transformers, f"{name}Model")(config), {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
    }


def _vision(name: str) -> Case:
    import transformers

    config = getattr(transformers, f"{name}Config")(**_VISION[name])
    return getattr(transformers, f"{name}Model")(config), {"pixel_values": torch.rand(2, 3, 224, 224)}


def cases() -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names, and what builds a network and its inputs."""
    from torchvision import models

    for name in models.list_models(module=models):
        yield f"torchvision:{name}", partial(_torchvision, name)
    for name in _TIMM:
        yield f"timm:{name}", partial(_timm, name)
    for name in _TEXT:
        yield f"transformers:{name}", partial(_text, name)
    for name in _VISION:
        yield f"transformers:{name}", partial(_vision, name)


def run(name: str, build: Callable[[], Case]) -> dict[str, Any]:
    """A row: what the export came to, or the reason for which it was refused."""
    start = time.process_time()
    torch.manual_seed(0)
    model, inputs = build()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    row: dict[str, Any] = {"name": name, "parameters": parameters}
    if parameters > _LARGE:
        return row | {"left out": "above 100 M parameters"}
    for parameter in model.parameters():
        if not parameter.any():  # heads that start at zero would hide every difference
            nn.init.normal_(parameter, std=0.02)
    network = bgd.quantize_weights(model.eval(), bgd.BGDConfig(em_iterations=1, max_divergence=None)).model
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = bgd.export(network, Path(folder) / "net.onnx", inputs)
        except bgd.BGDError as error:
            return row | {"refused": str(error), "seconds": time.process_time() - start}
    return row | {
        "bytes": done.size_bytes,
        "of ours": done.size_bytes / done.packed_bytes,
        "difference": done.largest_difference,
        "folded": done.is_folded,
        "seconds": time.process_time() - start,
    }


def main() -> None:
    """Run what is asked for; results are kept in a file, and only what is missing there is run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a glob on names")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bgd-export-zoo.json")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text()) if options.results.is_file() else []
    done = {row["name"] for row in rows}
    for name, build in cases():
        if name not in done and fnmatch.fnmatchcase(name, options.only):
            rows.append(run(name, build))
            options.results.write_text(json.dumps(rows, indent=1))
            print(rows[-1], flush=True)
            gc.collect()
    exported = [row for row in rows if "difference" in row]
    worst = max((row["difference"] for row in exported), default=0.0)
    refused = [row["name"] for row in rows if "refused" in row]
    print(f"{len(exported)} of {len(rows)} exported, largest difference {worst:.1e}; refused: {refused}")


if __name__ == "__main__":
    main()
