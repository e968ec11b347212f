# SPDX-License-Identifier: Apache-2.0
"""Objects of a Faster R-CNN or Mask R-CNN at the size of each image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfa_peft.dense.coco_masks import encode_masks
from sfa_peft.dense.inference import Size
from sfa_peft.errors import SFAError

CHUNK = 2**22  # pixels of masks that are pasted at a time, some 40 MB


@torch.no_grad()
def instances_from_boxes(
    outputs: Any, sizes: Sequence[Size], *, encode: bool = False
) -> list[dict[str, Any]]:
    """Return boxes, and masks where there are any, at the size of each image.

    Masks are pasted into their boxes by torchvision, and are where the probability is above 1/2.
    A few are pasted at a time, 4 million pixels or one mask; with ``encode`` the result is small.

    Args:
        outputs: What :class:`~sfa_peft.dense.RCNNForObjectDetection` returns in eval mode.
        sizes: Height and width, in pixels, at which the objects of each image are wanted: the
            original image's for scores.
        encode: Whether to return masks as COCO's run lengths; needs faster-coco-eval.

    Returns:
        For each image, by falling score: ``scores`` float64 ``(N,)``, ``labels`` int64 ``(N,)``,
        ``boxes`` float32 ``(N, 4)``: left, top, right, bottom in pixels, and for a mask head
        ``masks`` bool ``(N, H, W)`` or N run-length encodings, all on the CPU.

    Raises:
        SFAError: If the numbers of images differ, the outputs are of training mode, or
            faster-coco-eval is wanted and not installed.
    """
    if outputs.boxes is None:
        raise SFAError("instances_from_boxes: outputs of training mode; call model.eval() first")
    if len(sizes) != len(outputs.boxes) or any(min(size) < 1 for size in sizes):
        raise SFAError(
            f"expected height and width of {len(outputs.boxes)} images, got {list(sizes)[:8]}"
        )
    found = []
    for number, (size, frame) in enumerate(zip(sizes, outputs.sizes, strict=True)):
        factors = [size[1] / frame[1], size[0] / frame[0]] * 2
        boxes = outputs.boxes[number].float()
        boxes = boxes * boxes.new_tensor(factors)
        objects: dict[str, Any] = {
            "scores": outputs.scores[number].cpu().numpy().astype(np.float64),
            "labels": outputs.classes[number].cpu().numpy(),
            "boxes": boxes.cpu().numpy(),
        }
        if outputs.masks is not None:
            objects["masks"] = _paste(outputs.masks[number].float(), boxes, size, encode)
        found.append(objects)
    return found


def _paste(masks: Tensor, boxes: Tensor, size: Size, encode: bool) -> Any:
    from torchvision.models.detection import roi_heads  # pyright: ignore[reportMissingImports]

    pasted: list[Any] = []
    count = max(1, CHUNK // (size[0] * size[1]))
    for part, where in zip(masks.split(count), boxes.split(count), strict=True):
        inside = (roi_heads.paste_masks_in_image(part, where, size)[:, 0] > 0.5).cpu().numpy()
        pasted += encode_masks(inside) if encode and len(inside) else list(inside)
    return pasted if encode else np.array(pasted, bool).reshape(-1, *size)
