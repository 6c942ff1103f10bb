"""Pictures of coloured shapes with boxes and masks, made on the spot, and their average precision by pycocotools."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CLASSES", "SIZE", "Sample", "average_precision", "batches", "samples"]

SIZE = 96
CLASSES = ("disc", "square", "triangle")
Sample = tuple[Tensor, dict[str, Tensor]]


def samples(count: int, seed: int) -> list[Sample]:
    """Images `[3, SIZE, SIZE]` from 0 to 1, each with boxes, labels from 1 on, and masks, as torchvision's detectors
    take them. Shapes overlap; the later one covers the earlier one.
    """
    generator = np.random.default_rng(seed)
    return [_sample(generator) for _ in range(count)]


def _sample(generator: np.random.Generator) -> Sample:
    image = generator.uniform(0, 1, 3)[:, None, None] + generator.normal(0, 0.08, (3, SIZE, SIZE))
    masks, labels = [], []
    for _ in range(generator.integers(1, 5)):
        label = int(generator.integers(len(CLASSES)))
        mask = _shape(CLASSES[label], generator)
        image[:, mask] = generator.uniform(0, 1, 3)[:, None] + generator.normal(0, 0.08, (3, int(mask.sum())))
        masks = [earlier & ~mask for earlier in masks] + [mask]
        labels.append(label + 1)
    kept = [i for i, mask in enumerate(masks) if mask.sum() >= 60]
    boxes = [_box(masks[i]) for i in kept]
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor([labels[i] for i in kept], dtype=torch.int64),
        "masks": torch.from_numpy(np.stack([masks[i] for i in kept]).astype(np.uint8)),
    }
    return torch.from_numpy(np.clip(image, 0, 1)).float(), target


def _shape(kind: str, generator: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:SIZE, :SIZE]
    radius = generator.uniform(8, 22)
    cx, cy = generator.uniform(radius, SIZE - radius, 2)
    angle = generator.uniform(0, 2 * np.pi)
    u, v = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
    if kind == "disc":
        return np.asarray(u**2 + v**2 <= radius**2)
    if kind == "square":
        return np.asarray(np.maximum(abs(u), abs(v)) <= 0.75 * radius)
    return np.asarray((v <= radius / 2) & (np.sqrt(3) * abs(u) - v <= radius))


def _box(mask: np.ndarray) -> list[int]:
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]


def batches(data: list[Sample], size: int) -> list[tuple[list[Tensor], list[dict[str, Tensor]]]]:
    """The samples in batches, as a collating data loader gives them."""
    cut = [data[i : i + size] for i in range(0, len(data), size)]
    return [([image for image, _ in part], [target for _, target in part]) for part in cut]


@torch.no_grad()
def average_precision(model: nn.Module, data: list[Sample]) -> tuple[float, float]:
    """AP of boxes and of masks, averaged over overlaps from 0.5 to 0.95, in percent."""
    from pycocotools import mask as coco_mask
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def encoded(mask: Tensor) -> Any:
        return coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))

    truth: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    model.eval()
    for index, (image, target) in enumerate(data):
        (answer,) = model([image])
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"], strict=True):
            common = {"image_id": index, "category_id": int(label), "bbox": _xywh(box), "segmentation": encoded(mask)}
            truth.append(common | {"id": len(truth) + 1, "area": int(mask.sum()), "iscrowd": 0})
        masks = answer["masks"][:, 0] > 0.5
        for box, label, score, mask in zip(answer["boxes"], answer["labels"], answer["scores"], masks, strict=True):
            common = {"image_id": index, "category_id": int(label), "score": float(score), "bbox": _xywh(box)}
            answers.append(common | {"segmentation": encoded(mask)})
    found = []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": i, "width": SIZE, "height": SIZE} for i in range(len(data))],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
            "annotations": truth,
        }
        coco.createIndex()
        for kind in ("bbox", "segm"):
            if not answers:
                found.append(0.0)
                continue
            plain = [{k: v for k, v in a.items() if k != "segmentation" or kind == "segm"} for a in answers]
            plain = [{k: v for k, v in a.items() if k != "bbox" or kind == "bbox"} for a in plain]
            evaluation = COCOeval(coco, coco.loadRes(plain), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            found.append(100 * float(evaluation.stats[0]))
    return found[0], found[1]


def _xywh(box: Tensor) -> list[float]:
    x0, y0, x1, y1 = box.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
