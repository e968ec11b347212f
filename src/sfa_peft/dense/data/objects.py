# SPDX-License-Identifier: Apache-2.0
"""The objects of one image, and moving them as the image is resized, cropped or mirrored.

Boxes are ``(left, top, right, bottom)`` in pixels, on the edges between pixels: a box around pixel
column 3 alone spans 3 to 4. Where there are masks, boxes and areas after a crop are the masks' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.data.geometry import nearest
from sfa_peft.errors import SFAError


@dataclass(frozen=True)
class Objects:
    """What is in one image; there may be nothing.

    Attributes:
        boxes: Pixels, float32 ``(N, 4)``; no box is empty.
        classes: Class ids from 0, int64 ``(N,)``.
        masks: Pixels of each object, bool ``(N, H, W)``, or None where only boxes are known.
        areas: Pixels that each covers, float32 ``(N,)``; by default of the masks, else the boxes.
        crowd: Whether it stands for a group (COCO's ``iscrowd``), bool ``(N,)``; by default not.
        image_id: Number of the image in its data set.

    Raises:
        SFAError: If lengths or dimensions disagree, a box is empty or not finite, or a class id is
            negative.
    """

    boxes: NDArray[np.float32]
    classes: NDArray[np.int64]
    masks: NDArray[np.bool_] | None = None
    areas: NDArray[np.float32] = field(default=None)  # pyright: ignore[reportAssignmentType]
    crowd: NDArray[np.bool_] = field(default=None)  # pyright: ignore[reportAssignmentType]
    image_id: int = 0

    def __post_init__(self) -> None:
        count = len(self.classes)
        boxes = np.asarray(self.boxes, np.float32).reshape(-1, 4)
        settle = object.__setattr__
        settle(self, "boxes", boxes)
        settle(self, "classes", np.asarray(self.classes, np.int64))
        if self.areas is None:
            settle(self, "areas", _areas(boxes) if self.masks is None else _counts(self.masks))
        if self.crowd is None:
            settle(self, "crowd", np.zeros(count, bool))
        lengths = {"boxes": len(boxes), "areas": len(self.areas), "crowd": len(self.crowd)}
        if self.masks is not None:
            lengths["masks"] = len(self.masks)
            if self.masks.ndim != 3 or self.masks.dtype != bool:
                got = f"{self.masks.dtype} {self.masks.shape}"
                raise SFAError(f"masks of objects: expected bool (N, H, W), got {got}")
        if wrong := {name: length for name, length in lengths.items() if length != count}:
            raise SFAError(f"{count} objects by their classes, but got {wrong}")
        if count and self.classes.min() < 0:
            raise SFAError(f"class ids must be 0 or more, got {self.classes.min()}")
        good = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        if not good.all():
            bad = int(np.flatnonzero(~good)[0])
            raise SFAError(
                f"object {bad}: expected a box (left, top, right, bottom) with right > left and "
                f"bottom > top, got {boxes[bad].tolist()}"
            )

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.classes)

    def take(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Objects:
        """Return some of the objects.

        Args:
            chosen: One truth value per object, or indices.

        Returns:
            The chosen ones, in order.
        """
        return replace(
            self,
            boxes=self.boxes[chosen],
            classes=self.classes[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            areas=self.areas[chosen],
            crowd=self.crowd[chosen],
        )

    def without_masks(self) -> Objects:
        """Return the same boxes, classes and areas alone."""
        return replace(self, masks=None)


def objects_of_masks(
    masks: NDArray[np.bool_], classes: NDArray[np.int64], *, image_id: int = 0
) -> Objects:
    """Return objects whose boxes and areas are those of their masks; empty masks are left out.

    Args:
        masks: Bool ``(N, H, W)``.
        classes: Class ids, ``(N,)``.
        image_id: Number of the image.

    Returns:
        The objects, ``N`` or fewer.
    """
    kept = masks.any((1, 2))
    return Objects(mask_boxes(masks[kept]), classes[kept], masks[kept], image_id=image_id)


def mask_boxes(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the smallest box around each mask.

    Args:
        masks: Bool ``(N, H, W)``, none of them empty.

    Returns:
        Pixels, float32 ``(N, 4)``.
    """
    if not len(masks):
        return np.zeros((0, 4), np.float32)
    rows, columns = np.any(masks, 2), np.any(masks, 1)
    left, top = columns.argmax(1), rows.argmax(1)
    right = masks.shape[2] - columns[:, ::-1].argmax(1)
    bottom = masks.shape[1] - rows[:, ::-1].argmax(1)
    return np.stack((left, top, right, bottom), 1).astype(np.float32)


def flip_objects(objects: Objects, width: int) -> Objects:
    """Mirror left and right.

    Args:
        objects: Of an image.
        width: That image's width in pixels.

    Returns:
        The objects of the mirrored image.
    """
    left, top, right, bottom = objects.boxes.T
    masks = objects.masks
    return replace(
        objects,
        boxes=np.stack((width - right, top, width - left, bottom), 1),
        masks=None if masks is None else masks[:, :, ::-1],
    )


def resize_objects(objects: Objects, old: tuple[int, int], new: tuple[int, int]) -> Objects:
    """Scale with the image: boxes and areas in proportion, masks by the nearest neighbour.

    Args:
        objects: Of an image of size ``old``.
        old: Height and width in pixels.
        new: Height and width to come to.

    Returns:
        The objects, all of them: an object smaller than a pixel keeps its box beside an empty mask.
    """
    down, across = new[0] / old[0], new[1] / old[1]
    masks = objects.masks
    if masks is not None:
        rows, columns = nearest(old[0], new[0]), nearest(old[1], new[1])
        masks = masks[:, rows[:, None], columns[None]]
    scale = np.array((across, down, across, down), np.float32)
    areas = objects.areas * np.float32(down * across)
    return replace(objects, boxes=objects.boxes * scale, areas=areas, masks=masks)


def crop_objects(
    objects: Objects,
    window: tuple[int, int, int, int],
    *,
    min_side: float = 1.0,
    min_visible: float = 0.0,
) -> Objects:
    """Cut objects to a window, which may reach beyond the image, and drop what is left of too few.

    Args:
        objects: Of an image.
        window: ``(left, top, right, bottom)`` in pixels.
        min_side: Objects whose box is then narrower or lower are dropped, in pixels.
        min_visible: Objects of which a smaller share of the area is left are dropped.

    Returns:
        The objects in the window's own coordinates. With masks, boxes and areas are the masks';
        without, boxes are clipped and areas shrink as the boxes do.
    """
    left, top, right, bottom = window
    width, height = right - left, bottom - top
    shift = np.array((left, top, left, top), np.float32)
    limit = np.array((width, height, width, height), np.float32)
    boxes = np.clip(objects.boxes - shift, 0, limit).astype(np.float32)
    if objects.masks is None:
        share = _areas(boxes) / _areas(objects.boxes)
        areas = (objects.areas * share).astype(np.float32)
        masks, inside = None, share > 0
    else:
        masks = _window(objects.masks, window)
        areas = _counts(masks)
        share = areas / np.maximum(_counts(objects.masks), 1)
        inside = areas > 0
        boxes[inside] = mask_boxes(masks[inside])
    sides = (boxes[:, 2:] - boxes[:, :2]).min(1, initial=np.inf)
    kept = inside & (sides >= min_side) & (share >= min_visible)
    return Objects(
        boxes[kept],
        objects.classes[kept],
        None if masks is None else masks[kept],
        areas[kept],
        objects.crowd[kept],
        objects.image_id,
    )


def _window(masks: NDArray[np.bool_], window: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    left, top, right, bottom = window
    cut = np.zeros((len(masks), bottom - top, right - left), bool)
    _, height, width = masks.shape
    inside = masks[:, max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    row, column = max(-top, 0), max(-left, 0)
    if row < bottom - top and column < right - left and top < height and left < width:
        cut[:, row : row + inside.shape[1], column : column + inside.shape[2]] = inside
    return cut


def _areas(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    return ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).astype(np.float32)


def _counts(masks: NDArray[np.bool_]) -> NDArray[np.float32]:
    return masks.sum((1, 2)).astype(np.float32)
