# SPDX-License-Identifier: Apache-2.0
"""Detection and instance data: COCO's folders, and rows of the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sfa_peft.dense.coco_masks import coco_library
from sfa_peft.dense.data.coco import CocoSplit, is_box, objects_of_entries
from sfa_peft.dense.data.hf_datasets import split_of
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.data.splits import Found, cell_name, decode_cell
from sfa_peft.errors import SFAError

OBJECT_COLUMNS = ("objects", "annotations")

_CLASS_KEYS = ("category", "categories", "category_id", "label", "labels")


def coco(folder: Path, *, with_masks: bool) -> Found[Objects]:
    """Read COCO's layout: ``annotations/instances_<name>.json`` beside the images of ``<name>/``.

    ``<name>`` begins with the split: ``train2017``, ``val2017``. The images may also be in
    ``images/<name>/``. Annotations without any area are left out and counted.

    Args:
        folder: With ``annotations`` in it.
        with_masks: Whether masks are wanted beside the boxes.

    Returns:
        The splits and the class names.

    Raises:
        SFAError: If nothing is found, a folder is missing, a file is not COCO's, or two splits
            list other categories.
    """
    found: Found[Objects] = Found({})
    files = sorted((folder / "annotations").glob("instances_*.json"))
    for file in files:
        name = file.stem.removeprefix("instances_")
        split = split_of(name)
        if split is None:
            raise SFAError(f"`{file}`: `{name}` does not begin with train, val or test")
        if split in found.splits:
            raise SFAError(f"`{folder / 'annotations'}`: two files for {split}; keep one of them")
        places = (folder / name, folder / "images" / name, folder / "images")
        images = next((place for place in places if place.is_dir()), None)
        if images is None:
            raise SFAError(
                f"`{folder}`: no folder `{name}` or `images/{name}` beside `{file.name}`"
            )
        pairs = CocoSplit(file, images, with_masks=with_masks)
        if found.class_names and pairs.class_names != found.class_names:
            raise SFAError(f"`{file}`: its categories are not those of the other split")
        found.class_names = pairs.class_names
        found.splits[split] = pairs
        if pairs.dropped:
            found.notes.append(f"`{file}`: {pairs.dropped} annotations without any area")
    if not files:
        raise SFAError(f"`{folder / 'annotations'}`: no instances_<split>.json")
    return found


class LibraryObjects:
    """A split of the ``datasets`` library with a column of objects.

    A row's objects are ``{"bbox": [[left, top, width, height], ...], "category": [class id, ...]}``
    in pixels, as in most detection data on the Hub, or a list of such dicts, one per object;
    ``area``, ``iscrowd`` and ``segmentation`` (COCO's) may stand beside.

    Args:
        rows: Dataset whose image column is undecoded.
        image_column: Column of the images.
        objects_column: Column of the objects.
        num_classes: Number of classes.
        with_masks: Whether to decode the ``segmentation``.

    Raises:
        SFAError: If masks are wanted and faster-coco-eval, which decodes them, is not installed.
    """

    def __init__(
        self,
        rows: Any,
        image_column: str,
        objects_column: str,
        num_classes: int,
        *,
        with_masks: bool,
    ) -> None:
        if with_masks:
            coco_library()
        self.rows = rows
        self.image_column, self.objects_column = image_column, objects_column
        self.num_classes, self.with_masks = num_classes, with_masks

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, Objects]:
        """Decode row ``index``; raises SFAError naming it if it cannot be used."""
        row = self.rows[index]
        cell = row[self.image_column]
        stored = decode_cell(cell, self.image_column, index)
        where = cell_name(cell, self.objects_column, index)
        entries = _as_entries(row[self.objects_column], where)
        classes = [self._class_of(entry, where) for entry in entries]
        image = ImageOps.exif_transpose(stored)
        objects = objects_of_entries(
            entries,
            classes,
            image.size,
            with_masks=self.with_masks,
            where=where,
            image_id=row.get("image_id", index),
        )
        return image, objects

    def _class_of(self, entry: Mapping[str, Any], where: str) -> int:
        key = next((key for key in _CLASS_KEYS if key in entry), None)
        if key is None or not is_box(entry.get("bbox")):
            raise SFAError(
                f"{where}: expected bbox of 4 numbers and one of {_CLASS_KEYS}, got {dict(entry)}"
            )
        if not isinstance(entry[key], int) or not 0 <= entry[key] < self.num_classes:
            raise SFAError(
                f"{where}: {key} {entry[key]!r} is none of the {self.num_classes} classes "
                f"0 to {self.num_classes - 1}"
            )
        return entry[key]


def _as_entries(cell: Any, where: str) -> list[Mapping[str, Any]]:
    if not isinstance(cell, Mapping):
        return list(cell or ())
    columns = {key: values for key, values in cell.items() if isinstance(values, list)}
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise SFAError(f"{where}: expected lists of one length, got {lengths}")
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
