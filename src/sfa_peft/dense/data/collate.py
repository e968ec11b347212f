# SPDX-License-Identifier: Apache-2.0
"""Batches of images with objects, as the heads of transformers take them.

Images of different sizes are padded at the right and the bottom with 0, the mean colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad

from sfa_peft.errors import SFAError


def collate_detection(
    items: Sequence[dict[str, Any]], *, multiple: int = 1, masks: bool = False
) -> dict[str, Any]:
    """Make a batch for the DETR family, or for Faster R-CNN and Mask R-CNN.

    Boxes stay shares of their own image without its padding: DETR's position code counts from edge
    to edge of ``pixel_mask``, and ``post_process_object_detection`` scales by the image's size.
    Heads without a pixel mask (RT-DETR, D-FINE) need items of one size.

    Args:
        items: What the object transforms return.
        multiple: Height and width of the batch are the next multiple of it: 32 for RT-DETR.
        masks: Whether labels keep ``masks``, each of its own image's size, for Mask R-CNN.

    Returns:
        ``pixel_values``, float32 ``(B, 3, H, W)``; ``pixel_mask``, int64 ``(B, H, W)``, 1 on the
        image; ``labels``, a list of B dicts.

    Raises:
        SFAError: If there are no items or the multiple is below 1.
    """
    batch = _padded(items, multiple)
    drop = ("orig_masks",) if masks else ("masks", "orig_masks")
    batch["labels"] = [
        {name: value for name, value in item["labels"].items() if name not in drop}
        for item in items
    ]
    return batch


def collate_instances(items: Sequence[dict[str, Any]], *, multiple: int = 1) -> dict[str, Any]:
    """Make a batch for Mask2Former and MaskFormer, of instances.

    Args:
        items: What the object transforms return for objects with masks.
        multiple: Height and width of the batch are the next multiple of it.

    Returns:
        ``pixel_values`` and ``pixel_mask`` as :func:`collate_detection`; ``mask_labels``, a list of
        float32 ``(N, H, W)`` padded as the images; ``class_labels``, a list of int64 ``(N,)``.

    Raises:
        SFAError: If there are no items, the multiple is below 1, or an item has no masks.
    """
    batch = _padded(items, multiple)
    height, width = batch["pixel_values"].shape[-2:]
    masks = []
    for number, item in enumerate(items):
        if "masks" not in item["labels"]:
            raise SFAError(
                f"item {number} of the batch has boxes but no masks; instance segmentation needs "
                'data with masks (task="instances")'
            )
        own = item["labels"]["masks"].to(torch.float32)
        masks.append(pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])))
    batch["mask_labels"] = masks
    batch["class_labels"] = [item["labels"]["class_labels"] for item in items]
    return batch


def collate_semantic_masks(
    items: Sequence[dict[str, torch.Tensor]], *, ignore_index: int = 255
) -> dict[str, Any]:
    """Make a batch for Mask2Former and MaskFormer, of semantic segmentation.

    Args:
        items: What the mask transforms return, all of one size.
        ignore_index: Id in the labels that belongs to no mask.

    Returns:
        ``pixel_values``, float32 ``(B, 3, H, W)``; ``pixel_mask``, int64 ``(B, H, W)``, all 1;
        ``mask_labels``, a list of float32 ``(N, H, W)``, one mask per class there is;
        ``class_labels``, a list of int64 ``(N,)``; ``labels``, int64 ``(B, H, W)``, is left out:
        these heads do not take it.

    Raises:
        SFAError: If there are no items.
    """
    batch = _padded(items, 1)
    classes = [item["labels"].unique() for item in items]
    classes = [ids[ids != ignore_index] for ids in classes]
    batch["mask_labels"] = [
        (item["labels"][None] == ids[:, None, None]).to(torch.float32)
        for item, ids in zip(items, classes, strict=True)
    ]
    batch["class_labels"] = classes
    return batch


def _padded(items: Sequence[dict[str, Any]], multiple: int) -> dict[str, Any]:
    if not items or multiple < 1:
        raise SFAError(f"need items and a multiple of 1 or more, got {len(items)} and {multiple}")
    images = [item["pixel_values"] for item in items]
    height, width = (
        -(-max(image.shape[axis] for image in images) // multiple) * multiple for axis in (1, 2)
    )
    pixels = torch.zeros(len(images), 3, height, width)
    mask = torch.zeros(len(images), height, width, dtype=torch.int64)
    for number, image in enumerate(images):
        pixels[number, :, : image.shape[1], : image.shape[2]] = image
        mask[number, : image.shape[1], : image.shape[2]] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}
