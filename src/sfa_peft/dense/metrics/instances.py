# SPDX-License-Identifier: Apache-2.0
"""Objects of one image, checked and brought into the form that the COCO evaluation reads.

Boxes come in as transformers' post-processing returns them: corners in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.coco_masks import coco_library, encode_masks
from sfa_peft.dense.metrics.accumulator import as_array
from sfa_peft.errors import SFAError


@dataclass(frozen=True)
class Instances:
    """The objects of one image.

    Args:
        labels: Class ids, int64 ``(N,)``.
        scores: float64 ``(N,)``, None for ground truth.
        boxes: float64 ``(N, 4)``: left, top, width, height in pixels; None if not given.
        masks: N run-length encodings of COCO; None if not given.
        crowd: bool ``(N,)``.
        areas: float64 ``(N,)`` in pixels, None if not given.
    """

    labels: NDArray[np.int64]
    scores: NDArray[np.float64] | None
    boxes: NDArray[np.float64] | None
    masks: list[dict[str, Any]] | None
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64] | None

    def annotations(self, iou_type: str, image_id: int, first_id: int) -> list[dict[str, Any]]:
        """Return COCO annotations.

        Args:
            iou_type: ``"bbox"`` or ``"segm"``.
            image_id: Number of the image, from 1.
            first_id: Number of the first object, from 1: 0 means "unmatched" to COCO's code.

        Returns:
            One dict per object, as in the ``annotations`` of a COCO file or its result files.
        """
        objects = []
        areas = self._areas()
        for i, label in enumerate(self.labels.tolist()):
            item: dict[str, Any] = {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": label,
                "iscrowd": int(self.crowd[i]),
                "area": float(areas[i]),
            }
            if iou_type == "bbox" and self.boxes is not None:
                item["bbox"] = self.boxes[i].tolist()
            elif self.masks is not None:
                item["segmentation"] = self.masks[i]
            if self.scores is not None:
                item["score"] = float(self.scores[i])
            objects.append(item)
        return objects

    def _areas(self) -> NDArray[np.float64]:
        """Return the given areas, or the masks', or the boxes'; detections get theirs elsewhere."""
        if self.areas is not None:
            return self.areas
        if self.masks is not None:
            return np.array([_area(mask) for mask in self.masks], np.float64)
        return np.zeros(0) if self.boxes is None else self.boxes[:, 2] * self.boxes[:, 3]


def read_instances(
    item: Mapping[str, Any],
    *,
    num_classes: int,
    iou_types: tuple[str, ...],
    where: str,
    scored: bool,
) -> Instances:
    """Check the objects of one image.

    Args:
        item: ``labels`` or ``class_labels`` ``(N,)``; ``boxes`` ``(N, 4)``: left, top, right,
            bottom in pixels; ``masks``: bool or 0/1 ``(N, H, W)`` or N run-length encodings;
            ``scores`` ``(N,)`` of predictions; ``iscrowd`` and ``area`` ``(N,)`` of ground truth,
            if known.
        num_classes: Number of classes.
        iou_types: ``"bbox"`` needs boxes, ``"segm"`` masks.
        where: What to call this image in errors.
        scored: Whether these are predictions.

    Returns:
        The objects.

    Raises:
        SFAError: If something is missing, of another length, out of range or not finite.
    """
    labels = _labels(item, num_classes, where)
    count = labels.size
    scores = _vector(_need(item, "scores", where), count, "scores", where) if scored else None
    boxes = _boxes(_need(item, "boxes", where), count, where) if "bbox" in iou_types else None
    masks = _masks(_need(item, "masks", where), count, where) if "segm" in iou_types else None
    crowd = np.zeros(count, np.bool_)
    areas = None
    if not scored:
        if boxes is not None and count and (boxes[:, :2] + boxes[:, 2:]).max() <= 1:
            raise SFAError(f"{where}: all boxes end within one pixel; multiply by the image size")
        if item.get("iscrowd") is not None:
            crowd = _vector(item["iscrowd"], count, "iscrowd", where).astype(np.bool_)
        if item.get("area") is not None:
            areas = _vector(item["area"], count, "area", where)
    return Instances(labels, scores, boxes, masks, crowd, areas)


def mask_size(masks: list[dict[str, Any]] | None) -> tuple[int, int] | None:
    """Return height and width of run-length encoded masks, or None if there are none."""
    return (int(masks[0]["size"][0]), int(masks[0]["size"][1])) if masks else None


def _need(item: Mapping[str, Any], key: str, where: str) -> Any:
    if item.get(key) is None:
        raise SFAError(f"{where}: no {key!r}, only {sorted(item)}")
    return item[key]


def _labels(item: Mapping[str, Any], num_classes: int, where: str) -> NDArray[np.int64]:
    key = "labels" if item.get("labels") is not None else "class_labels"
    labels = as_array(_need(item, key, where)).reshape(-1)
    if labels.size and labels.dtype.kind not in "iu":
        raise SFAError(f"{where}: {key} must be integers, got {labels.dtype}")
    labels = labels.astype(np.int64)
    if labels.size and (labels.min() < 0 or labels.max() >= num_classes):
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise SFAError(
            f"{where}: class id {wrong}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); COCO's own category ids have gaps and must be renumbered"
        )
    return labels


def _vector(values: Any, count: int, what: str, where: str) -> NDArray[np.float64]:
    numbers = as_array(values).astype(np.float64).reshape(-1)
    if numbers.size != count:
        raise SFAError(f"{where}: {numbers.size} {what} for {count} labels")
    if not np.isfinite(numbers).all():
        raise SFAError(f"{where}: {what} hold a value that is not finite")
    return numbers


def _boxes(values: Any, count: int, where: str) -> NDArray[np.float64]:
    corners = as_array(values).astype(np.float64)
    corners = corners.reshape(0, 4) if not corners.size else corners
    if corners.shape != (count, 4):
        raise SFAError(f"{where}: boxes of shape {corners.shape} for {count} labels")
    if not np.isfinite(corners).all():
        raise SFAError(f"{where}: boxes hold a value that is not finite")
    size = corners[:, 2:] - corners[:, :2]
    if (size < 0).any():
        bad = corners[(size < 0).any(1)][0].tolist()
        raise SFAError(
            f"{where}: box {bad} ends before it begins; expected left, top, right, bottom"
        )
    return np.concatenate([corners[:, :2], size], 1)


def _masks(values: Any, count: int, where: str) -> list[dict[str, Any]]:
    if isinstance(values, (list, tuple)) and values and isinstance(values[0], Mapping):
        encoded = [dict(value) for value in values]
    else:
        encoded = _encode(as_array(values), where)
    if len(encoded) != count:
        raise SFAError(f"{where}: {len(encoded)} masks for {count} labels")
    if len({tuple(mask["size"]) for mask in encoded}) > 1:
        raise SFAError(f"{where}: masks of several sizes")
    return encoded


def _encode(masks: NDArray[Any], where: str) -> list[dict[str, Any]]:
    if not masks.size:
        return []
    if masks.ndim != 3:
        raise SFAError(f"{where}: expected masks (N, H, W), got {masks.shape}")
    if masks.dtype.kind != "b" and not np.isin(masks, (0, 1)).all():
        raise SFAError(f"{where}: masks must be bool or hold 0 and 1 only; threshold them first")
    return encode_masks(masks.astype(bool))


def _area(mask: dict[str, Any]) -> float:
    return float(coco_library().mask.area(mask))
