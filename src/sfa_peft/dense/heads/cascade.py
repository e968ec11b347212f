# SPDX-License-Identifier: Apache-2.0
"""Box heads one after the other, each trained on boxes that overlap more (Cai & Vasconcelos, 2018).

As MMDetection's ``CascadeRoIHead``: three stages at IoU .5, .6 and .7, one box for all classes,
losses of weight 1, 1/2 and 1/4, and at the end the last box with the mean of the three class
probabilities. One mask head, trained on the boxes of the first stage and used on the last, as in
Detectron2.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sfa_peft.dense.heads.torchvision_parts import make_detector, torchvision_detection

OVERLAPS = (0.5, 0.6, 0.7)
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
#: Scales of the box deltas of each stage: the inverse of MMDetection's standard deviations.
BOX_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))

Features = dict[str, Tensor]
Sizes = Sequence[tuple[int, int]]
Objects = list[dict[str, Tensor]]


class CascadeRoIHeads(nn.Module):
    """Three of torchvision's ``RoIHeads`` in a row, in their place.

    Args:
        config: An ``RCNNConfig``.

    Raises:
        SFAError: If torchvision is missing.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            make_detector(
                config,
                iou=overlap,
                box_weights=weights,
                one_box=True,
                masks=config.masks and number == 0,
            ).roi_heads
            for number, (overlap, weights) in enumerate(zip(OVERLAPS, BOX_WEIGHTS, strict=True))
        )

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Sizes,
        targets: Objects | None = None,
    ) -> tuple[Objects, dict[str, Tensor]]:
        """Return objects, or in training mode losses, as ``RoIHeads`` does.

        Args:
            features: Maps by name, ``(B, hidden_size, h, w)``.
            proposals: Boxes of each image, ``(N, 4)``: left, top, right, bottom in pixels.
            image_shapes: Height and width of each image.
            targets: In training mode ``boxes``, ``labels`` (from 1) and ``masks`` of each image.

        Returns:
            Of each image ``boxes``, ``labels``, ``scores`` and probabilities ``masks``
            ``(N, 1, 28, 28)``; and the losses by name. One of the two is empty.
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._found(features, proposals, image_shapes), {}

    def _losses(
        self, features: Features, boxes: list[Tensor], shapes: Sizes, targets: Objects | None
    ) -> dict[str, Tensor]:
        library, losses = torchvision_detection().roi_heads, {}
        stages: list[Any] = [*self.stages]
        for number, (stage, weight) in enumerate(zip(stages, LOSS_WEIGHTS, strict=True)):
            boxes, matches, classes, wanted = stage.select_training_samples(boxes, targets)
            logits, deltas = _predict(stage, features, boxes, shapes)
            of_classes, of_boxes = library.fastrcnn_loss(logits, deltas, classes, wanted)
            losses[f"loss_classifier_{number}"] = weight * of_classes
            losses[f"loss_box_reg_{number}"] = weight * of_boxes
            if stage.has_mask():
                chosen = [of_image > 0 for of_image in classes]
                inside = [box[is_object] for box, is_object in zip(boxes, chosen, strict=True)]
                matched = [m[is_object] for m, is_object in zip(matches, chosen, strict=True)]
                losses["loss_mask"] = library.maskrcnn_loss(
                    _mask_logits(stage, features, inside, shapes),
                    inside,
                    [target["masks"] for target in targets or ()],
                    [target["labels"] for target in targets or ()],
                    matched,
                )
            boxes = _refine(stage, deltas, boxes, shapes)
        return losses

    def _found(self, features: Features, boxes: list[Tensor], shapes: Sizes) -> Objects:
        stages: list[Any] = [*self.stages]
        first, last = stages[0], stages[-1]
        logits, deltas = _predict(first, features, boxes, shapes)
        shares = [logits.softmax(-1)]
        for before, stage in pairwise(stages):
            boxes = _refine(before, deltas, boxes, shapes)
            logits, deltas = _predict(stage, features, boxes, shapes)
            shares.append(logits.softmax(-1))
        # Their softmax is the mean again.
        logits = torch.stack(shares).mean(0).log()
        found = last.postprocess_detections(logits, deltas, boxes, shapes)
        objects = [
            {"boxes": of_image, "scores": scores, "labels": labels}
            for of_image, scores, labels in zip(*found, strict=True)
        ]
        if first.has_mask():
            logits = _mask_logits(first, features, found[0], shapes)
            masks = torchvision_detection().roi_heads.maskrcnn_inference(logits, found[2])
            for one, mask in zip(objects, masks, strict=True):
                one["masks"] = mask
        return objects


def _predict(
    stage: Any, features: Features, boxes: list[Tensor], shapes: Sizes
) -> tuple[Tensor, Tensor]:
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, shapes)))


def _mask_logits(stage: Any, features: Features, boxes: list[Tensor], shapes: Sizes) -> Tensor:
    return stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(features, boxes, shapes)))


@torch.no_grad()
def _refine(stage: Any, deltas: Tensor, boxes: list[Tensor], shapes: Sizes) -> list[Tensor]:
    """Return the boxes that a stage makes of its boxes, within the images."""
    clip = torchvision_detection().roi_heads.box_ops.clip_boxes_to_image
    moved = stage.box_coder.decode(deltas[:, :4], boxes).reshape(-1, 4)
    parts = moved.split([len(of_image) for of_image in boxes])
    return [clip(of_image, shape) for of_image, shape in zip(parts, shapes, strict=True)]
