# SPDX-License-Identifier: Apache-2.0
"""Ground truth in the frame in which COCO counts it: that of the image before any resizing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sfa_peft.errors import SFAError


def true_objects(labels: Mapping[str, Any]) -> dict[str, Any]:
    """Return an item's labels as :class:`~sfa_peft.dense.metrics.coco.CocoMetrics` takes them.

    Boxes, areas and masks are those of the image's own frame, ``orig_size``. What
    :class:`~sfa_peft.dense.data.object_transforms.ObjectResize` kept (``orig_boxes``,
    ``orig_area``, ``orig_masks``) is returned as it was, to the bit. Labels of transformers'
    processors lack it: their boxes and areas are scaled back.

    Args:
        labels: ``class_labels`` ``(N,)``, ``boxes`` ``(N, 4)``: centre, width and height as shares
            of the image, ``orig_size`` (height, width), and, if known, ``iscrowd`` ``(N,)``,
            ``area`` ``(N,)`` in pixels of ``size``, and ``masks`` ``(N, H, W)``.

    Returns:
        ``labels``, ``boxes`` (left, top, right, bottom in pixels), ``iscrowd``, ``area`` and
        ``masks``, the last three as far as they are known. Masks of another size than
        ``orig_size`` are left out: resizing would change them.

    Raises:
        SFAError: If there is no ``orig_size``.
    """
    height, width = _size(labels, "orig_size")
    boxes, areas, masks = (labels.get(f"orig_{name}") for name in ("boxes", "area", "masks"))
    if boxes is None:
        boxes = _corners(labels["boxes"], height, width)
    if areas is None and labels.get("area") is not None and labels.get("size") is not None:
        rows, columns = _size(labels, "size")
        areas = torch.as_tensor(labels["area"]).cpu().double() * (height * width / rows / columns)
    if masks is None and labels.get("masks") is not None:
        fits = tuple(labels["masks"].shape[-2:]) == (height, width)
        masks = labels["masks"] if fits else None
    found = {"boxes": boxes, "area": areas, "masks": masks, "iscrowd": labels.get("iscrowd")}
    known = {name: value for name, value in found.items() if value is not None}
    return {"labels": labels["class_labels"], **known}


def _size(labels: Mapping[str, Any], name: str) -> tuple[int, int]:
    if labels.get(name) is None:
        raise SFAError(f"labels without {name!r}, only {sorted(labels)}")
    height, width = (int(side) for side in labels[name])
    return height, width


def _corners(shares: Any, height: int, width: int) -> torch.Tensor:
    centres = torch.as_tensor(shares).cpu().double().reshape(-1, 4)
    corners = torch.cat(
        [centres[:, :2] - centres[:, 2:] / 2, centres[:, :2] + centres[:, 2:] / 2], 1
    )
    return corners * corners.new_tensor([width, height, width, height])
