# SPDX-License-Identifier: Apache-2.0
"""Load semantic segmentation data from the Hub or a local folder as pairs of image and mask.

Nothing is decoded here but the class names; pairs are decoded on access, one at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfa_peft.dense.data.splits import LibrarySplit, PairFolder, SegmentationSplit, SubSplit
from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.errors import SFAError

IMAGE_COLUMNS = ("image", "pixel_values", "img")
LABEL_COLUMNS = ("label", "annotation", "labels", "mask", "segmentation_mask", "semantic_mask")
CLASS_FILES = ("meta.json", "classes.json", "id2label.json")

_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


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
    names, stated_ignore = _classes(classes, folder)
    if folder.is_dir() and any(folder.glob("*annot")):
        splits = _pair_splits(folder)
    else:
        splits = _library_splits(name_or_dir, config_name, cache_dir, image_column, label_column)
    if "train" not in splits:
        raise SFAError(f"`{name_or_dir}`: no training split; found {sorted(splits) or 'nothing'}")
    if "validation" not in splits:
        splits |= _hold_out(splits["train"], holdout, name_or_dir)
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


def _in_id_order(names: Mapping[str, Any], path: str | Path) -> list[Any]:
    try:
        by_id = {int(key): name for key, name in names.items()}
    except ValueError as error:
        raise SFAError(f"`{path}`: the keys are not class ids: {sorted(names)[:5]}") from error
    if sorted(by_id) != list(range(len(by_id))):
        raise SFAError(f"`{path}`: class ids must be 0, 1, ... without a gap, got {sorted(by_id)}")
    return [by_id[i] for i in range(len(by_id))]


def _classes(
    classes: str | Path | Sequence[str] | None, folder: Path
) -> tuple[tuple[str, ...], int | None]:
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
        split = _split_of(images.name)
        if split is not None and images.is_dir():
            splits[split] = PairFolder(_pairs(images, masks))
    return splits


def _pairs(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    found = sorted(p for p in images.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)
    if not found:
        raise SFAError(f"`{images}`: no {' or '.join(_IMAGE_SUFFIXES)} files")
    pairs = [(image, masks / f"{image.stem}.png") for image in found]
    missing = [mask.name for _, mask in pairs if not mask.is_file()]
    if missing:
        raise SFAError(f"`{masks}`: {len(missing)} images have no mask, first `{missing[0]}`")
    return pairs


def _split_of(name: str) -> str | None:
    # "train-00000-of-00002", "train_1", "val" and "validation" all begin with the word looked for.
    word = re.match(r"[a-z]*", name.lower())
    return _SPLIT_WORDS.get(word.group()) if word else None


def _library_splits(
    name_or_dir: str | Path,
    config_name: str | None,
    cache_dir: str | Path | None,
    image_column: str | None,
    label_column: str | None,
) -> dict[str, SegmentationSplit]:
    from datasets import Image as ImageFeature
    from datasets import load_dataset

    folder, cache = Path(name_or_dir), None if cache_dir is None else str(cache_dir)
    if not folder.is_dir():
        loaded = load_dataset(str(name_or_dir), config_name, cache_dir=cache)
    elif any(folder.rglob("*.parquet")):
        loaded = load_dataset("parquet", data_files=_parquet_files(folder), cache_dir=cache)
    elif any(folder.rglob("metadata.*")):
        loaded = load_dataset("imagefolder", data_dir=str(folder), cache_dir=cache)
    else:
        raise SFAError(
            f"`{folder}`: no known layout; expected <split>/ beside <split>annot/, parquet files, "
            "or <split>/metadata.jsonl"
        )
    splits: dict[str, SegmentationSplit] = {}
    for name, rows in loaded.items():
        image = _column(rows.column_names, image_column, IMAGE_COLUMNS, "image_column")
        label = _column(rows.column_names, label_column, LABEL_COLUMNS, "label_column")
        # Decoding is ours: the library's errors do not name the file.
        undecoded = rows.cast_column(image, ImageFeature(decode=False))
        undecoded = undecoded.cast_column(label, ImageFeature(decode=False))
        splits[_split_of(str(name)) or str(name)] = LibrarySplit(undecoded, image, label)
    return splits


def _parquet_files(folder: Path) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.parquet")):
        # The folder's own name says nothing: only what lies in it.
        within = path.relative_to(folder)
        split = next(filter(None, (_split_of(part) for part in reversed(within.parts))), None)
        if split is None:
            raise SFAError(f"`{path}`: neither the file nor its folder is named after a split")
        files.setdefault(split, []).append(str(path))
    return files


def _column(there: Sequence[str], wanted: str | None, usual: Sequence[str], what: str) -> str:
    for name in usual if wanted is None else (wanted,):
        if name in there:
            return name
    looked_for = usual if wanted is None else wanted
    raise SFAError(f"no column {looked_for} among {sorted(there)}; pass {what}=")


def _hold_out(
    train: SegmentationSplit, holdout: float, name: str | Path
) -> dict[str, SegmentationSplit]:
    if not 0 < holdout < 1:
        raise SFAError(f"`{name}`: no validation split; pass holdout=0.1 to take a tenth of train")
    every = max(2, round(1 / holdout))
    kept = [i for i in range(len(train)) if i % every]
    held = [i for i in range(len(train)) if i % every == 0]
    return {"train": SubSplit(train, kept), "validation": SubSplit(train, held)}
