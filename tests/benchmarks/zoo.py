"""Every torchvision model through plan, quantize, save and load: what is found, what it weighs, whether it comes back.

Run `python -m tests.benchmarks.zoo`; `--docs` also writes docs/zoo.md. Weights are random and inputs small, so that the
whole zoo takes minutes: block and codebook sizes are the defaults (bytes and ratios are those of any run), while the
fit is EM with one iteration on one batch. What output difference remains says that the network still computes, not how
well the default method keeps it. Networks above 100 M parameters are planned only, on the meta device, but for one.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torchvision import models

import bgd_plugin as bgd
from bgd_plugin.support.tables import mib

_CONFIG = bgd.BGDConfig(method="em", em_iterations=1, batchnorm="keep", max_divergence=None)
_LARGE = 100_000_000
_LARGE_IN_FULL = "wide_resnet101_2"
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_KINDS = {
    "classification": models,
    "segmentation": models.segmentation,
    "detection": models.detection,
    "video": models.video,
    "optical flow": models.optical_flow,
}
_DOCS = Path(__file__).resolve().parents[2] / "docs"


def build(kind: str, name: str) -> nn.Module:
    """The network with random weights, for small inputs where its size is fixed when it is built."""
    arguments: dict[str, Any] = {"weights": None}
    if kind in ("segmentation", "detection"):
        arguments["weights_backbone"] = None
    if name.startswith("vit_"):
        arguments["image_size"] = 56 if name.endswith("14") else 64
    if name in ("googlenet", "inception_v3"):
        arguments |= {"init_weights": False, "aux_logits": False}
    model = models.get_model(name, **arguments)
    if hasattr(model, "transform") and not name.startswith("ssd"):
        model.transform.min_size, model.transform.max_size = (96,), 128
    return model.eval()


def inputs(kind: str, name: str) -> Any:
    """One batch."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"inception_v3": 96, "maxvit_t": 224}
    if kind == "detection":
        size = 320 if name.startswith("ssd") else 96
        return ([torch.rand(3, size, size, generator=generator)],)
    if kind == "optical flow":
        return {f"image{i}": torch.rand(1, 3, 128, 128, generator=generator) for i in (1, 2)}
    if kind == "video":
        frames, size = {"mvit_v1_b": (16, 224), "mvit_v2_s": (16, 224), "s3d": (16, 224)}.get(name, (8, 64))
        return torch.rand(1, 3, frames, size, size, generator=generator)
    size = sizes.get(name, 64)
    return torch.rand(2, 3, size, size, generator=generator)


def run(kind: str, name: str) -> dict[str, Any]:
    """A row of the table."""
    start = time.process_time()
    device = "cpu" if name.startswith("regnet") else "meta"  # RegNet computes its widths with tensors
    with torch.device(device):
        parameters = sum(p.numel() for p in models.get_model(name, weights=None, **_backbone(kind)).parameters())
    is_planned_only = parameters > _LARGE and name != _LARGE_IN_FULL
    torch.manual_seed(0)
    with torch.device(device if is_planned_only else "cpu"):
        model = build(kind, name)
    plan = bgd.plan(model, _CONFIG)
    row = {
        "kind": kind,
        "name": name,
        "parameters": parameters,
        "quantized": len(plan.layers),
        "reasons": dict(Counter(_reason(skipped.reason) for skipped in plan.skipped)),
        "found": _found(model, plan),
        "share": sum(layer.weights for layer in plan.layers) / parameters,
        "bytes": plan.compressed_bytes,
        "ratio": plan.ratio,
    }
    if not is_planned_only:
        row |= _in_full(model, inputs(kind, name))
    return row | {"seconds": time.process_time() - start}


def _backbone(kind: str) -> dict[str, Any]:
    return {"weights_backbone": None} if kind in ("segmentation", "detection") else {}


def _reason(reason: str) -> str:
    """A reason without the names in it."""
    for start in ("a plain tensor", "only ", "its weight is also used"):
        if reason.startswith(start):
            return {"only ": "too few blocks for a codebook"}.get(start, start)
    return reason


def _found(model: nn.Module, plan: bgd.results.Plan) -> float:
    """Share of the weights of convolutions, linear layers and attention's projections that the plan names."""
    weights: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, _LAYERS):
            weights[path] = module.weight.numel()
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            weights[f"{path}.in_proj_weight"] = module.in_proj_weight.numel()
    named = {layer.name for layer in plan.layers} | {skipped.name.removesuffix(".weight") for skipped in plan.skipped}
    return sum(size for path, size in weights.items() if path in named) / sum(weights.values())


def _in_full(model: nn.Module, batch: Any) -> dict[str, Any]:
    result = bgd.quantize(model, [batch], _CONFIG, progress=False)
    unreached = [s.name for s in result.report.skipped if s.reason.startswith("no calibration")]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net"
        length = bgd.save(result.model, path)
        loaded = bgd.load(path, like=model)
    mine, theirs = _answers(result.model, batch), _answers(loaded, batch)
    same_file = length == result.report.compressed_bytes
    equal = len(mine) == len(theirs) and all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    return {
        "difference": _difference(model, result.model, batch),
        "equal": equal and same_file,
        "unreached": len(unreached),
    }


@torch.no_grad()
def _answers(model: nn.Module, batch: Any) -> list[Tensor]:
    arguments = batch if isinstance(batch, dict) else {}
    positional = () if arguments else (batch[0] if isinstance(batch, tuple) else batch,)
    output = model(*positional, **arguments)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def _difference(model: Any, student: Any, batch: Any) -> float:
    """‖difference‖ / ‖output‖; of a detector, whose choice of boxes may change, that of its backbone's features."""
    if isinstance(batch, tuple):
        model, student, batch = model.backbone, student.backbone, torch.stack(batch[0])
    exact, found = (torch.cat([x.flatten().double() for x in _answers(net, batch)]) for net in (model, student))
    return float((exact - found).norm() / exact.norm())


def names() -> Iterator[tuple[str, str]]:
    """Kind and name of every architecture, the quantized variants of torchvision's own left out."""
    for kind, module in _KINDS.items():
        for name in models.list_models(module=module):
            yield kind, name


def document(rows: list[dict[str, Any]]) -> str:
    """The page."""
    full = [row for row in rows if "equal" in row]
    minutes = sum(row["seconds"] for row in rows) / 60
    lines = [
        "# Model zoo",
        "",
        "Every architecture that torchvision has, through `plan`, `quantize`, `save` and `load`. Written by",
        f"`make bench-zoo` ({minutes:.0f} CPU-minutes), with random weights and small inputs: sizes and ratios are",
        "those of any weights; the difference of outputs, after one EM iteration on one batch, only",
        f"shows that the network still computes. Measured on {datetime.date.today():%d %B %Y} at the fixed sizes of",
        "`BGDConfig(max_divergence=None)`.",
        "",
        f"* {len(rows)} architectures, {len(full)} of them in full; the others, above 100 M parameters, only planned.",
        f"* Saved and loaded, {sum(row['equal'] for row in full)} of {len(full)} give bit-identical outputs, and their",
        "  file is as long as the report says.",
        f"* The plan names at least {min(row['found'] for row in rows):.1%} of the weights of convolutions and linear",
        "  layers in each: quantized, or left float with a reason.",
        "",
    ]
    for kind in _KINDS:
        lines += [f"## {kind.capitalize()}", "", _HEADER]
        lines += [_line(row) for row in rows if row["kind"] == kind]
        lines.append("")
    lines += [
        "*Layers*: quantized + left float. *Found*: share of the weights of convolutions, linear layers and",
        "attention's projections that the plan names. *Weights*: share of all parameters that are quantized.",
        "*Difference*: ‖difference‖ / ‖output‖, for detectors of the backbone's features. *Back*: same bits after",
        "saving and loading.",
        "",
    ]
    return "\n".join(lines)


_HEADER = """| model | M parameters | layers | found | weights | file | ratio | difference | back | left float |
|---|---|---|---|---|---|---|---|---|---|"""


def _line(row: dict[str, Any]) -> str:
    reasons = "; ".join(f"{count} {reason}" for reason, count in row["reasons"].items())
    if row.get("unreached"):
        reasons += f"; {row['unreached']} not reached"
    full = "equal" in row
    cells = [
        row["name"],
        f"{row['parameters'] / 1e6:.1f}",
        f"{row['quantized']} + {sum(row['reasons'].values())}",
        f"{row['found']:.1%}",
        f"{row['share']:.1%}",
        mib(row["bytes"]),
        f"{row['ratio']:.1f}×",
        f"{row['difference']:.2f}" if full else "planned only",
        ("yes" if row["equal"] else "**no**") if full else "",
        reasons,
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what is asked for; results are kept in a file, and only what is missing there is run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="*", help="a glob on names")
    parser.add_argument("--results", type=Path, default=Path(tempfile.gettempdir()) / "bgd-zoo.json")
    parser.add_argument("--docs", action="store_true", help="write docs/zoo.md")
    options = parser.parse_args()
    rows = json.loads(options.results.read_text()) if options.results.is_file() else []
    done = {(row["kind"], row["name"]) for row in rows}
    for kind, name in names():
        if (kind, name) not in done and fnmatch.fnmatchcase(name, options.only):
            rows.append(run(kind, name))
            options.results.write_text(json.dumps(rows, indent=1))
            print(_line(rows[-1]), f"{rows[-1]['seconds']:.1f} s", flush=True)
            gc.collect()
    if options.docs:
        order = {pair: index for index, pair in enumerate(names())}
        rows.sort(key=lambda row: order[row["kind"], row["name"]])
        (_DOCS / "zoo.md").write_text(document(rows))


if __name__ == "__main__":
    main()
