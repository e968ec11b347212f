# SPDX-License-Identifier: Apache-2.0
"""ADE20K and Cityscapes in the folders they are distributed in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from sfa_peft.dense.data.files import IMAGE_SUFFIXES, IdTable, id_table, read_mask
from sfa_peft.dense.data.splits import Found, PairFolder
from sfa_peft.errors import SFAError

CITYSCAPES_CLASSES: tuple[str, ...] = (
    "road",
    "sidewalk",
    "building",
    "wall",
    "fence",
    "pole",
    "traffic light",
    "traffic sign",
    "vegetation",
    "terrain",
    "sky",
    "person",
    "rider",
    "car",
    "truck",
    "bus",
    "train",
    "motorcycle",
    "bicycle",
)
# From cityscapesScripts' helpers/labels.py: the ids of the 19 classes, in order of their train id.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


def ade20k(folder: Path, classes: Sequence[str] | None = None) -> Found[Image.Image]:
    """Read ADEChallengeData2016 of the scene parsing benchmark.

    ``images/training/*.jpg`` beside ``annotations/training/*.png``, and so for ``validation``. In
    the masks 0 means "other": it becomes 255, and 1 to 150 become 0 to 149.

    Args:
        folder: ``ADEChallengeData2016``.
        classes: Class names; by default those of ``objectInfo150.txt`` in the folder.

    Returns:
        ``train`` and ``validation``, class names, and which images have no mask.

    Raises:
        SFAError: If a folder or the class names are missing.
    """
    names = tuple(classes) if classes is not None else _object_info(folder / "objectInfo150.txt")
    table = id_table({class_id + 1: class_id for class_id in range(len(names))}, ignored=(0,))
    found = Found({}, names)
    for split, name in (("train", "training"), ("validation", "validation")):
        images, masks = folder / "images" / name, folder / "annotations" / name
        listed = sorted(p for p in _listed(images) if p.suffix.lower() in IMAGE_SUFFIXES)
        pairs = [(image, masks / f"{image.stem}.png") for image in listed]
        found.splits[split] = _pairs(pairs, table, images, found.missing)
    return found


def cityscapes(folder: Path) -> Found[Image.Image]:
    """Read Cityscapes with its fine annotations.

    ``leftImg8bit/train/<city>/*_leftImg8bit.png`` beside
    ``gtFine/train/<city>/*_gtFine_labelIds.png``, and so for ``val``. Of the 34 ids those of the 19
    classes become 0 to 18, all others 255. The test split has no public masks and is not read.

    Args:
        folder: With ``leftImg8bit`` and ``gtFine`` in it.

    Returns:
        ``train`` and ``validation``, class names, and which images have no mask.

    Raises:
        SFAError: If a folder is missing.
    """
    known = {stored: class_id for class_id, stored in enumerate(_CITYSCAPES_IDS)}
    # -1, a licence plate, is stored as 255.
    table = id_table(known, ignored=(set(range(34)) - set(known)) | {255})
    found = Found({}, CITYSCAPES_CLASSES)
    for split, name in (("train", "train"), ("validation", "val")):
        images, masks = folder / "leftImg8bit" / name, folder / "gtFine" / name
        _listed(images)
        pairs = []
        for image in sorted(images.glob("*/*_leftImg8bit.png")):
            frame = image.name.removesuffix("_leftImg8bit.png")
            pairs.append((image, masks / image.parent.name / f"{frame}_gtFine_labelIds.png"))
        found.splits[split] = _pairs(pairs, table, images, found.missing)
    return found


def _listed(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise SFAError(f"`{folder}`: no such folder; is the data set unpacked, and the path right?")
    return list(folder.iterdir())


def _pairs(
    pairs: list[tuple[Path, Path]], table: IdTable, images: Path, missing: list[str]
) -> PairFolder[Image.Image]:
    if not pairs:
        raise SFAError(f"`{images}`: no images where they are expected")
    there = [pair for pair in pairs if pair[1].is_file()]
    missing.extend(f"`{mask}` is missing" for image, mask in pairs if not mask.is_file())
    return PairFolder(there, partial(read_mask, table=table))


def _object_info(path: Path) -> tuple[str, ...]:
    # Idx, Ratio, Train, Val, Stuff, Name, separated by tabs or many blanks, below a heading.
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[1:]
    except OSError as error:
        raise SFAError(f"`{path}`: cannot read the class names: {error}; pass classes=") from error
    rows = [line.split(None, 5) for line in lines if line.strip()]
    if not rows or any(len(row) != 6 or row[0] != str(n) for n, row in enumerate(rows, start=1)):
        raise SFAError(f"`{path}`: expected rows of index, ratio, train, val, stuff and name")
    return tuple(row[5].strip() for row in rows)
