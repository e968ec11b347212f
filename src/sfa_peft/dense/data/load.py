# SPDX-License-Identifier: Apache-2.0
"""One way to load the data of any dense task, whatever the layout on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sfa_peft.dense.data.datasets import (
    CLASS_FILES,
    class_list,
    classes_of,
    hold_out,
    load_segmentation,
)
from sfa_peft.dense.data.depth_folders import kitti, nyuv2
from sfa_peft.dense.data.files import id_table, map_ids, metres_of, read_depth, read_mask
from sfa_peft.dense.data.folder_layouts import recognise
from sfa_peft.dense.data.hf_datasets import library_rows, pick_column, undecoded
from sfa_peft.dense.data.mask_folders import pair_folders
from sfa_peft.dense.data.object_folders import OBJECT_COLUMNS, LibraryObjects, coco
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.data.segmentation_folders import ade20k, cityscapes
from sfa_peft.dense.data.splits import Found, LibrarySplit, Split, SubSplit, name_of
from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.dense.data.voc import voc_boxes, voc_masks
from sfa_peft.dense.data.yolo import yolo
from sfa_peft.errors import DataWarning, SFAError, warn

DEPTH_COLUMNS = ("depth", "depth_map", "label")
IMAGE_COLUMNS = ("image", "pixel_values", "img")


@dataclass(frozen=True)
class DenseData:
    """Data of one dense task, split.

    Attributes:
        task: ``segmentation``, ``depth``, ``detection`` or ``instances``.
        train: Pairs to train on.
        validation: Pairs to choose by, if there are any.
        test: Pairs to report on, if there are any.
        class_names: Name of class id 0, 1, ...; none for depth.
        ignore_index: Id in the masks that means "not labelled": always 255, whatever the files
            have; so the transforms need not be told.
        skipped: What was left out and why, one line each.
    """

    task: str
    train: Split[Any]
    validation: Split[Any] | None
    test: Split[Any] | None
    class_names: tuple[str, ...]
    ignore_index: int
    skipped: tuple[str, ...] = ()

    def pick(self, split: str) -> Split[Any]:
        """Return ``train``, ``validation`` or ``test``; raises SFAError if there is none."""
        there = {"train": self.train, "validation": self.validation, "test": self.test}
        chosen = there.get(split)
        if chosen is None:
            names = sorted(name for name, found in there.items() if found is not None)
            raise SFAError(f"split='{split}': there is none; this data has {names}")
        return chosen


@dataclass(frozen=True)
class _Options:
    classes: str | Path | Sequence[str] | None
    image_column: str | None
    label_column: str | None
    ignore_index: int | None
    depth_scale: float
    holdout: float
    config_name: str | None
    cache_dir: str | Path | None


def load_dense(
    task: str,
    name_or_dir: str | Path,
    *,
    dataset_format: str = "auto",
    on_error: str = "raise",
    classes: str | Path | Sequence[str] | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    ignore_index: int | None = None,
    depth_scale: float = 1000.0,
    holdout: float = 0.0,
    config_name: str | None = None,
    cache_dir: str | Path | None = None,
) -> DenseData:
    """Load the data of a dense task; nothing is decoded before it is asked for.

    Args:
        task: ``segmentation``, ``depth``, ``detection`` or ``instances``.
        name_or_dir: Folder, or, for ``imagefolder``, the name of a Hub dataset.
        dataset_format: One of ``FORMATS``: the layout of the folder; "auto" looks what it is.
            ``imagefolder`` is also parquet, and what
            :func:`~sfa_peft.dense.data.datasets.load_segmentation` knows.
        on_error: ``raise`` stops at the first file that is missing or cannot be used, when it is
            come to. ``skip`` decodes every pair once, now, leaves out what cannot be used or has
            nothing labelled, and warns with the number.
        classes: Class names or a json file of them, for ``imagefolder``, ``folders``, ``ade20k``
            and ``voc``.
        image_column: Column of the images, for ``imagefolder``.
        label_column: Column of the masks, depth or objects, for ``imagefolder``.
        ignore_index: Id in the masks that means "not labelled", for ``imagefolder`` and
            ``folders``.
        depth_scale: Stored units per metre of integer depth, for ``imagefolder`` and ``folders``.
        holdout: Share of the training pairs to validate on if there is no validation split, in
            ``[0, 1)``; 0 for none.
        config_name: Configuration of a Hub dataset.
        cache_dir: Where ``datasets`` keeps its Arrow files.

    Returns:
        The splits, class names and what was left out.

    Raises:
        SFAError: If task or format is unknown, the format has no such task, the layout is another,
            or, with ``raise``, a file is missing.
    """
    if on_error not in ("raise", "skip"):
        raise SFAError(f"on_error: expected 'raise' or 'skip', got {on_error!r}")
    folder = Path(name_or_dir)
    read = _reader(task, folder, dataset_format)
    options = _Options(
        classes, image_column, label_column, ignore_index, depth_scale, holdout, config_name,
        cache_dir,
    )  # fmt: skip
    found = read(task, folder if folder.is_dir() else name_or_dir, options)
    if found.missing and on_error == "raise":
        raise SFAError(
            f"`{folder}`: {len(found.missing)} files cannot be used, first {found.missing[0]}; "
            "on_error='skip' leaves them out"
        )
    return _assemble(task, found, options, on_error, name_or_dir)


def _reader(task: str, folder: Path, dataset_format: str) -> Callable[..., Found[Any]]:
    """Return what reads a format, once task, format and folder go together."""
    if dataset_format not in ("auto", *FORMATS):
        known = ["auto", *sorted(FORMATS)]
        raise SFAError(f"dataset_format `{dataset_format}`: expected one of {known}")
    if dataset_format in ("auto", "imagefolder"):
        dataset_format = _recognised(task, folder, dataset_format)
    tasks, read = FORMATS[dataset_format]
    if task not in tasks:
        raise SFAError(f"task `{task}`: {dataset_format} has {list(tasks)}")
    if dataset_format != "imagefolder" and not folder.is_dir():
        raise SFAError(f"`{folder}`: no such folder; {dataset_format} is read from a folder")
    return read


def _recognised(task: str, folder: Path, dataset_format: str) -> str:
    """Return the format of a folder; a name that is no folder is one of the Hub."""
    formats = [name for name, (tasks, _) in FORMATS.items() if task in tasks]
    if not folder.is_dir() or not formats:
        return "imagefolder"
    found = recognise(folder, task, formats)
    if found != "imagefolder" and dataset_format == "imagefolder":
        raise SFAError(f"`{folder}` looks like {found}'s folder; pass dataset_format={found!r}")
    return found


def _assemble(
    task: str, found: Found[Any], options: _Options, on_error: str, name: str | Path
) -> DenseData:
    splits, skipped = dict(found.splits), found.notes + found.missing
    if "train" not in splits:
        raise SFAError(f"`{name}`: no training split; found {sorted(splits) or 'nothing'}")
    if on_error == "skip":
        for split, pairs in splits.items():
            splits[split], lines = usable(pairs)
            skipped += [f"{split}, {line}" for line in lines]
    if "validation" not in splits and options.holdout:
        splits |= hold_out(splits["train"], options.holdout, name)
    if skipped:
        warn(f"`{name}`: {len(skipped)} left out, first: {skipped[0]}", DataWarning)
    return DenseData(
        task,
        splits["train"],
        splits.get("validation"),
        splits.get("test"),
        found.class_names,
        IGNORE_INDEX,
        tuple(skipped),
    )


def usable(split: Split[Any]) -> tuple[SubSplit[Any], list[str]]:
    """Decode every pair of a split once and keep those that can be learned from.

    Args:
        split: Pairs of image and target; 255 in masks means "not labelled".

    Returns:
        The good pairs, and one line for each other: what cannot be read or does not fit, masks
        without a label and depth without a measurement. An image without objects is good.

    Raises:
        SFAError: If no pair is left.
    """
    kept, lines = [], []
    for index in range(len(split)):
        try:
            image, target = split[index]
            _check_labelled(image, target, name_of(split, index))
        except SFAError as error:
            lines.append(f"pair {index}: {error}")
        else:
            kept.append(index)
    if not kept:
        raise SFAError(f"none of {len(split)} pairs can be used; {lines[0] if lines else 'none'}")
    return SubSplit(split, kept), lines


def _check_labelled(image: Image.Image, target: Any, name: str) -> None:
    if isinstance(target, Objects):
        return
    array = np.asarray(target)
    if array.shape[::-1] != image.size:
        raise SFAError(f"{name}: image of {image.size} and target of {array.shape[::-1]} pixels")
    if not (array != (IGNORE_INDEX if array.dtype.kind in "biu" else 0)).any():
        raise SFAError(f"{name}: nothing is labelled")


def _library(task: str, source: str | Path, options: _Options) -> Found[Any]:
    if task == "segmentation":
        return _library_masks(source, options)
    found: Found[Any] = Found({})
    if task != "depth":
        found.class_names = class_list(options.classes, Path(source))
    for split, rows in library_rows(source, options.config_name, options.cache_dir).items():
        image = pick_column(rows.column_names, options.image_column, IMAGE_COLUMNS, "image_column")
        usual = DEPTH_COLUMNS if task == "depth" else OBJECT_COLUMNS
        label = pick_column(rows.column_names, options.label_column, usual, "label_column")
        if task == "depth":
            as_metres = partial(_metres, scale=options.depth_scale)
            rows = undecoded(rows, image, label)  # noqa: PLW2901
            found.splits[split] = LibrarySplit(rows, image, label, as_metres)
        else:
            found.splits[split] = LibraryObjects(
                undecoded(rows, image),
                image,
                label,
                len(found.class_names),
                with_masks=task == "instances",
            )
    return found


def _library_masks(source: str | Path, options: _Options) -> Found[Any]:
    data = load_segmentation(
        source,
        classes=options.classes,
        image_column=options.image_column,
        label_column=options.label_column,
        ignore_index=options.ignore_index,
        holdout=options.holdout,
        config_name=options.config_name,
        cache_dir=options.cache_dir,
    )
    table = id_table(
        {class_id: class_id for class_id in range(len(data.class_names))}, (data.ignore_index,)
    )
    splits = {"train": data.train, "validation": data.validation, "test": data.test}
    return Found(
        {name: KnownIds(split, table) for name, split in splits.items() if split is not None},
        data.class_names,
    )


class KnownIds:
    """A split of masks whose ids are looked up in a table; an id that is not in it is an error.

    Args:
        split: Pairs of image and mask.
        table: See :func:`~sfa_peft.dense.data.files.id_table`.
    """

    def __init__(self, split: Split[Image.Image], table: Any) -> None:
        self.split, self.table = split, table

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.split)

    def name(self, index: int) -> str:
        """Return what the split calls pair ``index``."""
        return name_of(self.split, index)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return pair ``index``, its mask mapped; raises SFAError for ids that are no classes."""
        image, mask = self.split[index]
        return image, map_ids(mask, self.table, self.name(index))


def _folders(task: str, folder: Path, options: _Options) -> Found[Any]:
    if task == "depth":
        return pair_folders(folder, task, partial(read_depth, scale=options.depth_scale))
    names, stated = classes_of(options.classes, folder)
    chosen = next(i for i in (options.ignore_index, stated, IGNORE_INDEX) if i is not None)
    table = id_table({class_id: class_id for class_id in range(len(names))}, (chosen,))
    found = pair_folders(folder, task, read_mask)
    splits: dict[str, Split[Any]] = {n: KnownIds(s, table) for n, s in found.splits.items()}
    return Found(splits, names)


def _voc(task: str, folder: Path, options: _Options) -> Found[Any]:
    there = any((folder / name).is_file() for name in CLASS_FILES)
    given = options.classes is not None or there
    names = class_list(options.classes, folder) if given else None
    if task == "detection":
        return voc_boxes(folder, names)
    found = voc_masks(folder, names)
    table = id_table({i: i for i in range(len(found.class_names))}, (IGNORE_INDEX,))
    found.splits = {name: KnownIds(split, table) for name, split in found.splits.items()}
    return found


def _metres(image: Image.Image, name: str, *, scale: float) -> Any:
    return metres_of(image, scale, name)


_Reader = Callable[[str, Any, _Options], Found[Any]]

# By name of the format: the tasks it is for, and what reads it.
FORMATS: dict[str, tuple[tuple[str, ...], _Reader]] = {
    "ade20k": (
        ("segmentation",),
        lambda task, folder, o: ade20k(
            folder, None if o.classes is None else class_list(o.classes, folder)
        ),
    ),
    "cityscapes": (("segmentation",), lambda task, folder, o: cityscapes(folder)),
    "coco": (
        ("detection", "instances"),
        lambda task, folder, o: coco(folder, with_masks=task == "instances"),
    ),
    "folders": (("segmentation", "depth"), _folders),
    "imagefolder": (("segmentation", "depth", "detection", "instances"), _library),
    "kitti": (("depth",), lambda task, folder, o: kitti(folder)),
    "nyuv2": (("depth",), lambda task, folder, o: nyuv2(folder)),
    "voc": (("segmentation", "detection"), _voc),
    "yolo": (
        ("detection", "instances"),
        lambda task, folder, o: yolo(folder, with_masks=task == "instances"),
    ),
}
