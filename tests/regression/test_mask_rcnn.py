"""Mask R-CNN as the paper has it: its sizes, on the meta device."""

from __future__ import annotations

import torch
from torchvision.models.detection import maskrcnn_resnet50_fpn

import bgd_plugin as bgd


def test_the_papers_setting_comes_to_the_papers_size() -> None:
    with torch.device("meta"):
        model = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    plan = bgd.plan(model, bgd.BGDConfig.paper("mask_rcnn"))
    assert (len(plan.layers), [s.name for s in plan.skipped]) == (
        70,
        [
            "backbone.body.conv1",
            "rpn.head.cls_logits",
            "rpn.head.bbox_pred",
            "roi_heads.mask_predictor.mask_fcn_logits",
        ],
    )
    assert plan.paper_bytes <= 6.65 * 2**20
    assert abs(plan.compressed_bytes / plan.paper_bytes - 1) < 0.03
    assert plan.original_bytes / plan.paper_bytes > 25
