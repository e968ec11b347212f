# SPDX-License-Identifier: Apache-2.0
"""Boxes and masks from COCO's json; images and masks are decoded on access."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfa_peft.dense.coco_masks import coco_library, decode_mask
from sfa_peft.dense.data.files import read_image
from sfa_peft.dense.data.objects import Objects
from sfa_peft.errors import SFAError

Json = Mapping[str, Any]


class CocoSplit:
    """A split by one json file of COCO's format.

    Category ids become class ids 0, 1, ... in their order; :attr:`category_ids` has them back.

    Args:
        annotations: The json file, with ``images``, ``categories`` and ``annotations``.
        images: Folder that the ``file_name`` entries are relative to.
        with_masks: Whether to decode the masks.

    Attributes:
        class_names: Name of class id 0, 1, ...
        category_ids: The file's own id of class id 0, 1, ...
        dropped: Number of annotations left out because their box has no area in the image.

    Raises:
        SFAError: If the file cannot be read, lacks one of the three lists or an entry what is
            needed of it, an annotation is of an unknown image or category, or masks are wanted and
            faster-coco-eval, which decodes them, is not installed.
    """

    def __init__(self, annotations: Path, images: Path, *, with_masks: bool) -> None:
        if with_masks:
            coco_library()
        content = _read(annotations)
        self.file, self.folder, self.with_masks = annotations, images, with_masks
        sides = {"width": float, "height": float}
        _check(content["categories"], f"`{annotations}`: category", id=int, name=str)
        _check(content["images"], f"`{annotations}`: image", id=int, file_name=str, **sides)
        _check(content["annotations"], f"`{annotations}`: annotation")
        categories = sorted(content["categories"], key=lambda entry: entry["id"])
        self.category_ids = tuple(int(entry["id"]) for entry in categories)
        self.class_names = tuple(str(entry["name"]) for entry in categories)
        self.images: tuple[Json, ...] = tuple(content["images"])
        self._class_of = {number: index for index, number in enumerate(self.category_ids)}
        self._objects: dict[int, list[Json]] = {int(entry["id"]): [] for entry in self.images}
        if len(self._objects) != len(self.images):
            raise SFAError(f"`{annotations}`: two images have one id")
        self.dropped = 0
        for entry in content["annotations"]:
            self._add(entry)

    def _add(self, entry: Json) -> None:
        where = f"`{self.file}`: annotation {entry.get('id')}"
        if entry.get("category_id") not in self._class_of:
            raise SFAError(
                f"{where} is of category {entry.get('category_id')}, which is not listed"
            )
        if entry.get("image_id") not in self._objects:
            raise SFAError(f"{where} is of image {entry.get('image_id')}, which is not listed")
        if not is_box(entry.get("bbox")):
            raise SFAError(f"{where}: expected a bbox of 4 numbers, got {entry.get('bbox')}")
        if self.with_masks and not entry.get("segmentation"):
            raise SFAError(f"{where} has no segmentation; instance segmentation needs masks")
        if entry["bbox"][2] > 0 and entry["bbox"][3] > 0:
            self._objects[entry["image_id"]].append(entry)
        else:
            self.dropped += 1

    def __len__(self) -> int:
        """Return the number of images, those without objects too."""
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        """Decode image ``index`` and its objects.

        Args:
            index: In ``[0, len)``.

        Returns:
            The image and its objects, boxes cut to the image.

        Raises:
            SFAError: If the image is corrupt or not of the size that the json file says, a mask
                cannot be decoded, or a box lies outside the image.
        """
        entry = self.images[index]
        path = self.folder / entry["file_name"]
        image = read_image(path)
        stated = (int(entry["width"]), int(entry["height"]))
        if image.size != stated:
            raise SFAError(
                f"`{path}` is {image.width}x{image.height}, but `{self.file}` says "
                f"{stated[0]}x{stated[1]} (width x height); turned by EXIF, or another file?"
            )
        annotations = self._objects[int(entry["id"])]
        classes = [self._class_of[annotation["category_id"]] for annotation in annotations]
        where = f"`{self.file}`: image {entry['id']} (`{entry['file_name']}`)"
        return image, objects_of_entries(
            annotations,
            classes,
            image.size,
            with_masks=self.with_masks,
            where=where,
            image_id=entry["id"],
        )


def objects_of_entries(
    entries: Sequence[Json],
    classes: Sequence[int],
    size: tuple[int, int],
    *,
    with_masks: bool,
    where: str,
    image_id: int,
) -> Objects:
    """Return objects of annotations as COCO writes them.

    Args:
        entries: Each with ``bbox`` (left, top, width, height in pixels), and, if they have them,
            ``area``, ``iscrowd`` and ``segmentation``.
        classes: Class id of each.
        size: Width and height of the image; boxes are cut to it.
        with_masks: Whether to decode ``segmentation``.
        where: What an error begins with.
        image_id: Number of the image.

    Returns:
        The objects.

    Raises:
        SFAError: If a mask is missing or cannot be decoded, a box lies outside the image, or an
            area is no number.
    """
    boxes = np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    boxes = np.clip(boxes, 0, size * 2).astype(np.float32)
    masks = np.zeros((len(entries), size[1], size[0]), bool)
    areas = np.zeros(len(entries), np.float32)
    for number, entry in enumerate(entries):
        which = f"{where}, " + (
            f"annotation {entry['id']}" if "id" in entry else f"object {number}"
        )
        if not (boxes[number, 2:] > boxes[number, :2]).all():
            raise SFAError(
                f"{which}: bbox {entry['bbox']} (left, top, width, height) has no area in the "
                f"{size[0]}x{size[1]} image"
            )
        area = entry.get("area")
        area = entry["bbox"][2] * entry["bbox"][3] if area is None else area
        if not _is_number(area):
            raise SFAError(f"{which}: expected an area in pixels, got {str(area)[:60]!r}")
        areas[number] = area
        if with_masks:
            try:
                masks[number] = decode_mask(entry.get("segmentation"), size[1], size[0])
            except SFAError as error:
                raise SFAError(f"{which}: {error}") from error
    return Objects(
        boxes,
        np.array(classes, np.int64),
        masks if with_masks else None,
        areas,
        np.array([bool(entry.get("iscrowd")) for entry in entries], bool),
        int(image_id),
    )


def is_box(value: Any) -> bool:
    """Return whether something is a list of 4 finite numbers."""
    if not isinstance(value, Sequence) or len(value) != 4:
        return False
    return all(_is_number(number) for number in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


_KINDS = {int: "a whole number", float: "a number", str: "text"}


def _check(entries: Sequence[Any], what: str, **needed: type) -> None:
    """Refuse a list of json in which an entry is no object or lacks one of some keys."""
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            raise SFAError(f"{what} number {number}: expected an object, got {str(entry)[:60]}")
        for key, kind in needed.items():
            if not isinstance(entry.get(key), (int, float) if kind is float else kind):
                raise SFAError(
                    f"{what} number {number}: expected `{key}`, {_KINDS[kind]}, got "
                    f"{str(entry.get(key))[:60]}"
                )


def _read(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SFAError(f"`{path}`: cannot read annotations: {error}") from error
    lists = ("images", "categories", "annotations")
    if not isinstance(content, Mapping) or not all(isinstance(content.get(n), list) for n in lists):
        raise SFAError(f"`{path}`: expected COCO's json with the lists {lists}")
    return content
