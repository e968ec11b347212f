# SPDX-License-Identifier: Apache-2.0
"""Faster R-CNN and Mask R-CNN, with the necks and the cascade of the SFA paper."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from transformers import Swinv2Backbone, set_seed

from common.backbones import load_backbone
from common.objects import ObjectScoring
from sfa_peft import SFAError
from sfa_peft.dense import (
    RCNNConfig,
    RCNNForObjectDetection,
    collate_detection,
    instances_from_boxes,
)

collate_masks = partial(collate_detection, masks=True)


@dataclass
class RCNNOptions:
    """Options of scripts that can have these heads; defaults are for rendered scenes."""

    neck: Literal["fpn", "bifpn"] = field(
        default="fpn", metadata={"help": "Of Faster and Mask R-CNN: how maps of scales are fused."}
    )
    neck_layers: int = field(
        default=3, metadata={"help": "Of BiFPN: how often, there and back; 3 in EfficientDet-D0."}
    )
    cascade: bool = field(
        default=False,
        metadata={"help": "Of Faster and Mask R-CNN: three box heads in a row in place of one."},
    )
    anchor_scale: float = field(
        default=4.0,
        metadata={"help": "Of Faster and Mask R-CNN: side of anchors in strides; 8 in theirs."},
    )
    num_samples: int = field(
        default=64,
        metadata={
            "help": "Of Faster and Mask R-CNN: regions of an image to train on; 512 in theirs."
        },
    )


def check_rcnn(options: RCNNOptions, *, is_used: bool) -> None:
    """Refuse options that cannot work, or that no head reads."""
    if min(options.neck_layers, options.num_samples) < 1 or not options.anchor_scale > 0:
        raise SFAError(
            "--neck_layers, --num_samples, --anchor_scale: expected 1 or more, and more than 0"
        )
    if not is_used and (options.cascade or options.neck != "fpn"):
        raise SFAError("--neck, --cascade: of --head faster_rcnn and mask_rcnn only")


def make_rcnn(args: Any, num_labels: int, *, masks: bool) -> RCNNForObjectDetection:
    """Return the head on the pretrained backbone, the same for every method.

    Args:
        args: The run's arguments; `RCNNOptions` and `hidden_size` are used.
        num_labels: Classes.
        masks: Whether there is a mask head.

    Raises:
        SFAError: If torchvision is missing.
    """
    backbone: Swinv2Backbone = load_backbone(args)
    set_seed(args.seed)
    config = RCNNConfig(
        backbone_config=backbone.config,
        neck=args.neck,
        neck_layers=args.neck_layers,
        cascade=args.cascade,
        masks=masks,
        hidden_size=args.hidden_size,
        anchor_scale=args.anchor_scale,
        num_samples=args.num_samples,
        norm_features=args.norm_outputs,
        num_labels=num_labels,
    )
    model = RCNNForObjectDetection(config)
    model.backbone = backbone
    return model


def predict_rcnn(
    model: Any, batch: dict[str, Any], sizes: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """Return scores, classes, boxes and masks in each image of a batch, at those sizes."""
    with torch.no_grad():
        outputs = model(
            pixel_values=batch["pixel_values"].to(model.device), pixel_mask=batch["pixel_mask"]
        )
    return instances_from_boxes(outputs, sizes, encode=True)


def score_rcnn(class_names: list[str], *, masks: bool, num_workers: int) -> ObjectScoring:
    """Return the average precision of boxes, and of masks where there are any, and pictures."""
    boxes = {"box AP": "bbox_map", "box AP50": "bbox_map_50"}
    return ObjectScoring(
        headers=boxes | ({"mask AP": "segm_map", "mask AP50": "segm_map_50"} if masks else {}),
        class_names=class_names,
        collate=collate_masks if masks else collate_detection,
        predict=predict_rcnn,
        iou_types=("bbox", "segm") if masks else ("bbox",),
        num_workers=num_workers,
    )
