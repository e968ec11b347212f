# SPDX-License-Identifier: Apache-2.0
"""Load semantic segmentation data from the Hub or a local folder as pairs of image and mask.

Nothing is decoded here but the class names; pairs are decoded on access, one at a time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_peft.dense.data.files import IMAGE_SUFFIXES
from sfa_peft.dense.data.hf_datasets import library_rows, pick_column, split_of, undecoded
from sfa_peft.dense.data.splits import (
    LibrarySplit,
    PairFolder,
    SegmentationSplit,
    Split,
    SubSplit,
    TargetT,
)
from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.errors import SFAError

IMAGE_COLUMNS = ("image", "pixel_values", "img")
LABEL_COLUMNS = ("label", "annotation", "labels", "mask", "segmentation_mask", "semantic_mask")
CLASS_FILES = ("meta.json", "classes.json", "id2label.json")


@dataclass(frozen=True)
class SegmentationData:
    """Segmentation data, split.

    Attributes:
        train: Pairs to train on.
        validation: Pairs to choose by.
        test: Pairs to report on, if there are any.
        class_names: Name of class id 0, 1, ...
        ignore_index: Id in the masks that means "not labelled"; give it to the transforms.
    """

    train: SegmentationSplit
    validation: SegmentationSplit
    test: SegmentationSplit | None
    class_names: tuple[str, ...]
    ignore_index: int


def load_segmentation(
    name_or_dir: str | Path,
    *,
    classes: str | Path | Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    ignore_index: int | None = None,
    holdout: float = 0.0,
    config_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> SegmentationData:
    """Load a dataset of images and masks by Hub name or from a folder.

    A folder may be laid out as

    * pairs: ``<split>/*.jpg|png`` beside ``<split>annot/*.png``, matched by stem (CamVid);
    * parquet files, the split in the file's or its folder's name (``train-00000.parquet``);
    * imagefolder: ``<split>/metadata.jsonl`` with columns like ``image_file_name`` and
      ``label_file_name``, read by the ``datasets`` library.

    Args:
        name_or_dir: Folder, if one of that name exists, else the name of a Hub dataset.
        classes: Class names, or a json file that holds a list of names, ``{"0": name, ...}``,
            ``{"id2label": {...}}`` or ``{"classes": [...], "ignore_index": 11}`` (or ``"ignore"``).
            By default the first of ``CLASS_FILES`` in the folder.
        image_column: Column of the images; by default the first of ``IMAGE_COLUMNS`` there is.
        label_column: Column of the masks; by default the first of ``LABEL_COLUMNS`` there is.
        ignore_index: Id in the masks that means "not labelled"; by default what the json file says,
            else 255.
        holdout: Share of the training pairs to validate on if there is no validation split, in
            ``[0, 1)``; every ``round(1 / holdout)``-th pair is taken.
        config_name: Configuration of a Hub dataset.
        cache_dir: Where ``datasets`` keeps its Arrow files.

    Returns:
        The splits, the class names and the ignore index.

    Raises:
        SFAError: If the layout is not known, a split, column, mask or class name is missing, or the
            json file does not have one of the shapes above.
    """
    folder = Path(name_or_dir)
    names, stated_ignore = classes_of(classes, folder)
    if folder.is_dir() and any(folder.glob("*annot")):
        splits = _pair_splits(folder)
    else:
        splits = _library_splits(name_or_dir, config_name, cache_dir, image_column, label_column)
    if "train" not in splits:
        raise SFAError(f"`{name_or_dir}`: no training split; found {sorted(splits) or 'nothing'}")
    if "validation" not in splits:
        splits |= hold_out(splits["train"], holdout, name_or_dir)
    chosen = next(i for i in (ignore_index, stated_ignore, IGNORE_INDEX) if i is not None)
    return SegmentationData(
        splits["train"], splits["validation"], splits.get("test"), names, chosen
    )


def read_classes(path: str | Path) -> tuple[tuple[str, ...], int | None]:
    """Read class names, and the ignore index where one is stated, from a json file.

    Args:
        path: File of one of the shapes listed at :func:`load_segmentation`.

    Returns:
        The names in order of class id, and the ignore index or None.

    Raises:
        SFAError: If the file is missing, no json, or of another shape.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SFAError(f"`{path}`: cannot read class names: {error}") from error
    ignore = None
    if isinstance(content, Mapping):
        stated = content.get("ignore_index", content.get("ignore"))
        ignore = stated if isinstance(stated, int) else None
        content = content.get("classes", content.get("id2label", content))
    if isinstance(content, Mapping):
        content = _in_id_order(content, path)
    if not isinstance(content, list) or not content or not all(isinstance(n, str) for n in content):
        raise SFAError(
            f'`{path}`: expected a list of names, {{"id2label": {{"0": name}}}} or '
            '{"classes": [names], "ignore_index": id}'
        )
    return tuple(content), ignore


def class_list(classes: str | Path | Sequence[str] | None, folder: Path) -> tuple[str, ...]:
    """Return class names as given, of a json file, or of one in the folder; raises SFAError."""
    return classes_of(classes, folder)[0]


def _in_id_order(names: Mapping[str, Any], path: str | Path) -> list[Any]:
    try:
        by_id = {int(key): name for key, name in names.items()}
    except ValueError as error:
        raise SFAError(f"`{path}`: the keys are not class ids: {sorted(names)[:5]}") from error
    if sorted(by_id) != list(range(len(by_id))):
        raise SFAError(f"`{path}`: class ids must be 0, 1, ... without a gap, got {sorted(by_id)}")
    return [by_id[i] for i in range(len(by_id))]


def classes_of(
    classes: str | Path | Sequence[str] | None, folder: Path
) -> tuple[tuple[str, ...], int | None]:
    """Return class names as `class_list` does, and the ignore index where one is stated."""
    if isinstance(classes, (str, Path)):
        return read_classes(classes)
    if classes is not None:
        if not classes:
            raise SFAError("classes is an empty list; name at least one class")
        return tuple(classes), None
    for name in CLASS_FILES:
        if (folder / name).is_file():
            return read_classes(folder / name)
    raise SFAError(f"`{folder}`: no class names; pass classes= or add one of {CLASS_FILES}")


def _pair_splits(folder: Path) -> dict[str, SegmentationSplit]:
    splits: dict[str, SegmentationSplit] = {}
    for masks in sorted(folder.glob("*annot")):
        images = folder / masks.name.removesuffix("annot")
        split = split_of(images.name)
        if split is not None and images.is_dir():
            splits[split] = PairFolder(_pairs(images, masks))
    return splits


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise SFAError(f"`{images}`: no {' or '.join(IMAGE_SUFFIXES)} files")
    pairs = [(image, masks / f"{image.stem}.png") for image in found]
    missing = [mask.name for _, mask in pairs if not mask.is_file()]
    if missing:
        raise SFAError(f"`{masks}`: {len(missing)} images have no mask, first `{missing[0]}`")
    return pairs


def _library_splits(
    name_or_dir: str | Path,
    config_name: str | None,
    cache_dir: str | Path | None,
    image_column: str | None,
    label_column: str | None,
) -> dict[str, SegmentationSplit]:
    splits: dict[str, SegmentationSplit] = {}
    for split, rows in library_rows(name_or_dir, config_name, cache_dir).items():
        image = pick_column(rows.column_names, image_column, IMAGE_COLUMNS, "image_column")
        label = pick_column(rows.column_names, label_column, LABEL_COLUMNS, "label_column")
        splits[split] = LibrarySplit(undecoded(rows, image, label), image, label)
    return splits


def hold_out(train: Split[TargetT], holdout: float, name: str | Path) -> dict[str, Split[TargetT]]:
    """Return ``train`` without every ``round(1/holdout)``-th pair, and these as ``validation``."""
    if not 0 < holdout < 1:
        raise SFAError(f"`{name}`: no validation split; pass holdout=0.1 to take a tenth of train")
    every = max(2, round(1 / holdout))
    kept = [i for i in range(len(train)) if i % every]
    held = [i for i in range(len(train)) if i % every == 0]
    return {"train": SubSplit(train, kept), "validation": SubSplit(train, held)}
