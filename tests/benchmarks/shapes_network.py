"""A small Mask R-CNN, and its training on pictures of shapes."""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign

from tests.benchmarks.shapes_data import CLASSES, SIZE, batches, samples

__all__ = ["load_or_train", "network"]

logger = logging.getLogger(__name__)

_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "shapes"
_WIDTHS = (32, 64, 128, 256)
_CHANNELS = 64


class Block(nn.Module):
    """A residual block with batch norm, as in ResNet-18."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.down = nn.Conv2d(before, after, 1, stride=2, bias=False)
        self.bn3 = nn.BatchNorm2d(after)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.bn3(self.down(x)))


class Backbone(nn.Module):
    """Four stages and a feature pyramid on the last three."""

    def __init__(self) -> None:
        super().__init__()
        self.out_channels = _CHANNELS
        self.stem = nn.Conv2d(3, _WIDTHS[0], 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(_WIDTHS[0])
        pairs = itertools.pairwise(_WIDTHS)
        self.stages = nn.ModuleList(Block(before, after) for before, after in pairs)
        self.fpn = FeaturePyramidNetwork(list(_WIDTHS[1:]), _CHANNELS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.bn(self.stem(x)))
        maps: OrderedDict[str, Tensor] = OrderedDict()
        for index, stage in enumerate(self.stages):
            x = stage(x)
            maps[str(index)] = x
        features: dict[str, Tensor] = self.fpn(maps)
        return features


def network() -> MaskRCNN:
    """The network with random weights."""
    names = ["0", "1", "2"]
    classes = len(CLASSES) + 1
    return MaskRCNN(
        Backbone(),
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(((12,), (24,), (44,)), ((0.7, 1.0, 1.4),) * 3),
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=50,
        rpn_batch_size_per_image=64,
        box_roi_pool=MultiScaleRoIAlign(names, 7, 2),
        box_head=TwoMLPHead(_CHANNELS * 49, 512),
        box_predictor=_predictor(classes),
        box_batch_size_per_image=32,
        box_detections_per_img=20,
        mask_roi_pool=MultiScaleRoIAlign(names, 14, 2),
        mask_head=MaskRCNNHeads(_CHANNELS, (_CHANNELS,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, classes),
    )


def _predictor(classes: int) -> nn.Module:
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor

    return FastRCNNPredictor(512, classes)


def load_or_train(steps: int, batch_size: int = 8, seed: int = 0) -> MaskRCNN:
    """The trained network, from the cache where it was trained as long."""
    torch.manual_seed(seed)
    model = network()
    path = _CACHE / f"maskrcnn-{steps}-{batch_size}-{seed}.safetensors"
    if path.is_file():
        model.load_state_dict(safetensors.torch.load_file(path))
        return model.eval()
    _train_(model, steps, batch_size, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), path)
    return model.eval()


def _train_(model: MaskRCNN, steps: int, batch_size: int, seed: int) -> None:
    data = samples(2000, seed=1000 + seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.15)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        order = torch.randint(len(data), (batch_size,)).tolist()
        ((images, targets),) = batches([_flipped(*data[i], torch.rand(2) < 0.5) for i in order], batch_size)
        losses = model(images, targets)
        loss = sum(losses.values())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            logger.info(
                "step %d of %d: loss %.3f, %.0f s", step, steps, float(loss.detach()), time.perf_counter() - start
            )


def _flipped(image: Tensor, target: dict[str, Tensor], flips: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same picture, mirrored along one axis, both, or none: shapes stay what they are."""
    boxes = target["boxes"].clone()
    masks = target["masks"]
    for axis, flip in enumerate(flips.tolist()):
        if flip:
            image, masks = image.flip(-1 - axis), masks.flip(-1 - axis)
            boxes[:, [axis, axis + 2]] = SIZE - boxes[:, [axis + 2, axis]]
    return image, target | {"boxes": boxes, "masks": masks}
