# SPDX-License-Identifier: Apache-2.0
"""Which layout a folder has, so that nobody has to say it; or what is there and what would do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sfa_peft.dense.data.mask_folders import TARGETS, find_pairs
from sfa_peft.dense.data.voc import MASKS, XML, find_voc
from sfa_peft.dense.data.yolo import FILES
from sfa_peft.errors import SFAError

# What lies in the folder of a data set, by the name of its format.
_SIGNS = {
    "coco": ("annotations/instances_*.json",),
    "ade20k": ("objectInfo150.txt", "annotations/training"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "nyuv2": ("nyu_depth_v2_labeled.mat", "nyudepthv2_*_files_with_gt.txt"),
    "kitti": ("eigen_*_files_with_gt.txt",),
    "yolo": FILES,
}
_METADATA = {
    "segmentation": '{"image_file_name": "1.jpg", "label_file_name": "1_mask.png"}',
    "depth": '{"image_file_name": "1.jpg", "depth_file_name": "1_depth.png"}',
    "detection": '{"file_name": "1.jpg", "objects": {"bbox": [[8, 4, 20, 30]], "category": [2]}}',
    "instances": '{"file_name": "1.jpg", "objects": {"bbox": [[8, 4, 20, 30]], "category": [2], '
    '"segmentation": [[[8, 4, 28, 4, 28, 34]]]}}',
}
#: Trees that would do, by task.
_WOULD_DO = {
    "segmentation": (
        "images/a.jpg  masks/a.png",
        "images/train/a.jpg  masks/train/a.png  images/val/b.jpg  masks/val/b.png",
        "train/a.jpg  trainannot/a.png  val/b.jpg  valannot/b.png",
        "JPEGImages/a.jpg  SegmentationClass/a.png  ImageSets/Segmentation/train.txt",
    ),
    "depth": (
        "images/a.jpg  depth/a.png",
        "train/images/a.jpg  train/depth/a.png  val/images/b.jpg  val/depth/b.png",
    ),
    "detection": (
        "train/a.jpg  val/b.jpg  annotations/instances_train.json  annotations/instances_val.json",
        "data.yaml  images/train/a.jpg  labels/train/a.txt",
        "JPEGImages/a.jpg  Annotations/a.xml",
    ),
    "instances": (
        "train/a.jpg  val/b.jpg  annotations/instances_train.json  annotations/instances_val.json",
        "data.yaml  images/train/a.jpg  labels/train/a.txt, with outlines",
    ),
}
_MOST = 8  # folders and kinds of files that an error shows


def recognise(folder: Path, task: str, formats: Sequence[str]) -> str:
    """Return the name of a folder's format.

    Args:
        folder: It exists.
        task: ``segmentation``, ``depth``, ``detection`` or ``instances``.
        formats: Names of the formats that there are for this task.

    Raises:
        SFAError: If it has none that is known, or one that is not for this task. The error shows
            what is there, and what would do.
    """
    if task == "segmentation" and any(folder.glob("*annot")):
        return "imagefolder"
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return "imagefolder"
    found = next(
        (n for n, signs in _SIGNS.items() if any(any(folder.glob(s)) for s in signs)), None
    )
    if found is None and _is_voc(folder, task):
        found = "voc"
    if found is None and task in TARGETS and find_pairs(folder, task):
        found = "folders"
    if found in formats and found is not None:
        return found
    if found is not None:
        raise SFAError(f"`{folder}` looks like {found}'s folder, which is not for {task}")
    if any(folder.rglob("*.parquet")) or any(folder.rglob("metadata.*")):
        return "imagefolder"
    would_do = "; ".join(f"({n}) {tree}" for n, tree in enumerate(_WOULD_DO[task], 1))
    raise SFAError(
        f"`{folder}`: no known layout. There: {tree(folder) or 'nothing'}. Would do for {task}: "
        f"{would_do}; or parquet files; or <split>/metadata.jsonl with a line per image like "
        f"{_METADATA[task]}"
    )


def tree(folder: Path) -> str:
    """Return what is in a folder, two levels deep: folders with numbers of files by kind."""
    parts = []
    for place in (folder, *sorted(p for p in folder.iterdir() if p.is_dir())):
        kinds = Counter(p.suffix or p.name for p in place.iterdir() if p.is_file())
        inner = sorted(p.name for p in place.iterdir() if p.is_dir() and place != folder)
        shown = [f"{n} {kind}" for kind, n in sorted(kinds.items())] + [
            f"{name}/" for name in inner
        ]
        if shown or place != folder:
            name = "" if place == folder else f"{place.name}/ "
            parts.append(f"{name}({', '.join(shown[:_MOST]) or 'empty'})")
    more = f", and {len(parts) - _MOST} more" if len(parts) > _MOST else ""
    return ", ".join(parts[:_MOST]) + more


def _is_voc(folder: Path, task: str) -> bool:
    root = find_voc(folder)
    wanted = MASKS if task == "segmentation" else XML
    return root is not None and task != "depth" and (root / wanted).is_dir()
