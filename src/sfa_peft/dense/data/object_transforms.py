# SPDX-License-Identifier: Apache-2.0
"""Joint augmentation of an image and its objects: boxes, and masks where there are any.

Items are laid out as the processors of transformers' DETR family lay them out, one dict of labels
per image; the collators make batches of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from sfa_peft.dense.data.geometry import as_size, random_offset
from sfa_peft.dense.data.objects import Objects, crop_objects, flip_objects, resize_objects
from sfa_peft.dense.data.transforms import (
    FILL,
    ImageLike,
    as_image,
    colour_jitter,
    normalise,
)
from sfa_peft.errors import SFAError

ObjectTransform = Callable[[ImageLike, Objects, np.random.Generator], dict[str, Any]]


def objects_to_tensors(
    image: ImageLike, objects: Objects, orig_size: tuple[int, int] | None = None
) -> dict[str, Any]:
    """Normalise an image by ImageNet's mean and deviation and return it with its objects.

    Args:
        image: See :func:`~sfa_peft.dense.data.transforms.as_image`.
        objects: Of that image.
        orig_size: Height and width before any transform; by default the image's.

    Returns:
        ``pixel_values``, float32 ``(3, H, W)``, and ``labels``, a dict of

        * ``class_labels``, int64 ``(N,)``;
        * ``boxes``, float32 ``(N, 4)``: centre x, centre y, width and height as shares of this
          image's width and height (of the image without padding, as in DETR's own code);
        * ``area``, float32 ``(N,)``, pixels of this image, and ``iscrowd``, int64 ``(N,)``;
        * ``size`` and ``orig_size``, int64 ``(2,)``, height, width; ``image_id``, int64 ``(1,)``;
        * ``masks``, bool ``(N, H, W)``, if the objects have masks.

    Raises:
        SFAError: If the masks are not as large as the image.
    """
    picture = as_image(image)
    height, width = picture.height, picture.width
    _check_size(picture, objects)
    left, top, right, bottom = objects.boxes.T
    boxes = np.stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), 1)
    scaled = (boxes / np.array((width, height, width, height), np.float32)).astype(np.float32)
    labels = {
        "class_labels": torch.from_numpy(objects.classes.copy()),
        "boxes": torch.from_numpy(scaled),
        "area": torch.from_numpy(objects.areas.astype(np.float32)),
        "iscrowd": torch.from_numpy(objects.crowd.astype(np.int64)),
        "size": torch.tensor((height, width)),
        "orig_size": torch.tensor(orig_size or (height, width)),
        "image_id": torch.tensor((objects.image_id,)),
    }
    if objects.masks is not None:
        labels["masks"] = torch.from_numpy(np.ascontiguousarray(objects.masks))
    return {"pixel_values": normalise(picture), "labels": labels}


def shortest_edge_size(
    size: tuple[int, int], shortest: int, longest: int | None = None
) -> tuple[int, int]:
    """Return the size at which the shorter side is ``shortest``, unless the longer gets too long.

    Args:
        size: Height and width.
        shortest: Pixels that the shorter side shall have.
        longest: Pixels that the longer side may have; by default any number.

    Returns:
        Height and width of nearly the same proportion.
    """
    low, high = min(size), max(size)
    scale = shortest / low
    if longest is not None:
        scale = min(scale, longest / high)
    height, width = (max(1, round(side * scale)) for side in size)
    return height, width


class ObjectScaleCrop:
    """Random scale, crop, flip and jitter to one size (large-scale jitter of Ghiasi et al., 2021).

    At scale 1 the image just fits into the crop; what it leaves free is filled with the mean
    colour. Crowds are left out: no loss knows them.

    Args:
        size: Side of the square crop, or its height and width, in pixels.
        scale: Range of the random scale, two positive numbers; the paper has 0.1 to 2.
        flip: Probability of a horizontal flip, in ``[0, 1]``.
        jitter: Strength of the colour jitter, in ``[0, 1]``; 0 for none.
        min_side: Objects whose box is then narrower or lower are dropped, in pixels; by default
            those of less than a pixel.
        min_visible: Objects of which the crop leaves a smaller share are dropped, in ``[0, 1]``; by
            default none: what is visible is kept, as in Mask2Former.

    Raises:
        SFAError: If a number is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.8, 1.6),
        flip: float = 0.5,
        jitter: float = 0.3,
        min_side: float = 1.0,
        min_visible: float = 0.0,
    ) -> None:
        self.size = as_size(size)
        if not 0 < scale[0] <= scale[1]:
            raise SFAError(f"scale must be two positive numbers in order, got {scale}")
        _check_shares(flip=flip, jitter=jitter, min_visible=min_visible)
        self.scale, self.flip, self.jitter = scale, flip, jitter
        self.min_side, self.min_visible = min_side, min_visible

    def __call__(
        self, image: ImageLike, objects: Objects, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Augment one image.

        Args:
            image: See :func:`~sfa_peft.dense.data.transforms.as_image`.
            objects: Of that image.
            rng: Source of all randomness.

        Returns:
            As :func:`objects_to_tensors`, of the crop's size; there may be no object left.

        Raises:
            SFAError: If image and masks do not fit together.
        """
        picture, old = _checked(image, objects)
        objects = objects.take(~objects.crowd)
        height, width = self.size
        factor = rng.uniform(*self.scale) * min(height / old[0], width / old[1])
        new = (max(1, round(old[0] * factor)), max(1, round(old[1] * factor)))
        left, top = random_offset(new[1], width, rng), random_offset(new[0], height, rng)
        canvas = Image.new("RGB", (width, height), FILL)
        canvas.paste(picture.resize((new[1], new[0]), Image.Resampling.BILINEAR), (-left, -top))
        objects = crop_objects(
            resize_objects(objects, old, new),
            (left, top, left + width, top + height),
            min_side=self.min_side,
            min_visible=self.min_visible,
        )
        canvas, objects = _flip_and_jitter(canvas, objects, self.flip, self.jitter, rng)
        return objects_to_tensors(canvas, objects, old)


class ObjectShortestEdge:
    """DETR's augmentation: flip, half of the time a crop, then a random length of the shorter side.

    Images of one batch differ in size, so the collators pad. Crowds are left out.

    Args:
        shortest: Lengths of the shorter side to draw from, pixels.
        longest: What the longer side may have, pixels.
        crop: Probability of a crop first, in ``[0, 1]``; it keeps 60 to 100 % of each side.
        flip: Probability of a horizontal flip, in ``[0, 1]``.
        jitter: Strength of the colour jitter, in ``[0, 1]``; 0 for none.
        min_side: Objects whose box is then narrower or lower are dropped, in pixels of the result;
            by default those of less than a pixel.
        min_visible: Objects of which the crop leaves a smaller share are dropped, in ``[0, 1]``; by
            default none.

    Raises:
        SFAError: If a number is out of its range.
    """

    def __init__(
        self,
        shortest: Sequence[int] = tuple(range(480, 801, 32)),
        longest: int | None = 1333,
        *,
        crop: float = 0.5,
        flip: float = 0.5,
        jitter: float = 0.0,
        min_side: float = 1.0,
        min_visible: float = 0.0,
    ) -> None:
        if not shortest or min(shortest) < 1 or (longest is not None and longest < 1):
            raise SFAError(f"need lengths of 1 or more, got {list(shortest)} and {longest}")
        _check_shares(crop=crop, flip=flip, jitter=jitter, min_visible=min_visible)
        self.shortest, self.longest, self.crop = tuple(shortest), longest, crop
        self.flip, self.jitter = flip, jitter
        self.min_side, self.min_visible = min_side, min_visible

    def __call__(
        self, image: ImageLike, objects: Objects, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Augment one image; see :meth:`ObjectScaleCrop.__call__`. The size is drawn."""
        picture, old = _checked(image, objects)
        objects = objects.take(~objects.crowd)
        if rng.random() < self.crop:
            shares = rng.uniform(0.6, 1.0, 2)
            height, width = (max(1, round(s * side)) for s, side in zip(shares, old, strict=True))
            left, top = random_offset(old[1], width, rng), random_offset(old[0], height, rng)
            window = (left, top, left + width, top + height)
            picture = picture.crop(window)
            objects = crop_objects(objects, window, min_side=0.0, min_visible=self.min_visible)
        now = (picture.height, picture.width)
        new = shortest_edge_size(now, int(rng.choice(self.shortest)), self.longest)
        picture = picture.resize((new[1], new[0]), Image.Resampling.BILINEAR)
        whole = (0, 0, new[1], new[0])
        objects = crop_objects(resize_objects(objects, now, new), whole, min_side=self.min_side)
        picture, objects = _flip_and_jitter(picture, objects, self.flip, self.jitter, rng)
        return objects_to_tensors(picture, objects, old)


class ObjectResize:
    """Resize for evaluation; every object is kept, crowds too, which ``iscrowd`` tells.

    COCO counts in the image's own frame, so the labels also have boxes, areas and masks as they
    were before: ``orig_boxes``, float32 ``(N, 4)``: left, top, right, bottom in pixels,
    ``orig_area`` ``(N,)`` and ``orig_masks`` ``(N, H, W)`` of the size ``orig_size``.
    :func:`~sfa_peft.dense.metrics.ground_truth.true_objects` makes ground truth of them.

    Args:
        size: Side of the square result, or its height and width; or None to go by ``shortest``.
        shortest: Length of the shorter side, if ``size`` is None; None there leaves the size alone.
        longest: What the longer side may have, if ``size`` is None.

    Raises:
        SFAError: If a number is not positive.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        *,
        shortest: int | None = None,
        longest: int | None = None,
    ) -> None:
        self.size = None if size is None else as_size(size)
        if any(side is not None and side < 1 for side in (shortest, longest)):
            raise SFAError(f"shortest and longest must be positive, got {shortest} and {longest}")
        self.shortest, self.longest = shortest, longest

    def __call__(
        self, image: ImageLike, objects: Objects, rng: np.random.Generator | None = None
    ) -> dict[str, Any]:
        """Resize one image; see :meth:`ObjectScaleCrop.__call__`. ``rng`` is not used."""
        picture, old = _checked(image, objects)
        new, own = self.size or old, objects
        if self.size is None and self.shortest is not None:
            new = shortest_edge_size(old, self.shortest, self.longest)
        if new != old:
            picture = picture.resize((new[1], new[0]), Image.Resampling.BILINEAR)
            objects = resize_objects(objects, old, new)
        item = objects_to_tensors(picture, objects, old)
        item["labels"]["orig_boxes"] = torch.from_numpy(own.boxes.copy())
        item["labels"]["orig_area"] = torch.from_numpy(own.areas.astype(np.float32))
        if own.masks is not None:
            item["labels"]["orig_masks"] = torch.from_numpy(np.ascontiguousarray(own.masks))
        return item


def _checked(image: ImageLike, objects: Objects) -> tuple[Image.Image, tuple[int, int]]:
    picture = as_image(image)
    _check_size(picture, objects)
    return picture, (picture.height, picture.width)


def _check_size(picture: Image.Image, objects: Objects) -> None:
    height, width = picture.height, picture.width
    if objects.masks is not None and objects.masks.shape[1:] != (height, width):
        raise SFAError(
            f"image {objects.image_id} and its objects' masks must have one size, got "
            f"{width}x{height} and {objects.masks.shape[2]}x{objects.masks.shape[1]} "
            "(width x height)"
        )
    over = objects.boxes[:, 2:].max(0, initial=0) - (width, height)
    if max(over) > 1 or objects.boxes.min(initial=0) < -1:
        raise SFAError(
            f"image {objects.image_id} is {width}x{height} (width x height), but a box reaches "
            f"beyond it: {objects.boxes.min(0).tolist()} to {objects.boxes.max(0).tolist()}"
        )


def _check_shares(**shares: float) -> None:
    if wrong := {name: share for name, share in shares.items() if not 0 <= share <= 1}:
        raise SFAError(f"expected numbers in [0, 1], got {wrong}")


def _flip_and_jitter(
    picture: Image.Image,
    objects: Objects,
    flip: float,
    jitter: float,
    rng: np.random.Generator,
) -> tuple[Image.Image, Objects]:
    if rng.random() < flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        objects = flip_objects(objects, picture.width)
    return (colour_jitter(picture, jitter, rng) if jitter else picture), objects
