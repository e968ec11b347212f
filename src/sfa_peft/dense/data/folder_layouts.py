# SPDX-License-Identifier: Apache-2.0
"""Which layout a folder has, for those who forget to say so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfa_peft.errors import SFAError

# What lies in the folder of a data set, by the name of its format.
_SIGNS = {
    "coco": ("annotations/instances_*.json",),
    "ade20k": ("objectInfo150.txt", "annotations/training"),
    "cityscapes": ("leftImg8bit", "gtFine"),
    "nyuv2": ("nyu_depth_v2_labeled.mat", "nyudepthv2_*_files_with_gt.txt"),
    "kitti": ("eigen_*_files_with_gt.txt",),
}
_METADATA = {
    "segmentation": '{"image_file_name": "1.jpg", "label_file_name": "1_mask.png"}',
    "depth": '{"image_file_name": "1.jpg", "depth_file_name": "1_depth.png"}',
    "detection": '{"file_name": "1.jpg", "objects": {"bbox": [[8, 4, 20, 30]], "category": [2]}}',
    "instances": '{"file_name": "1.jpg", "objects": {"bbox": [[8, 4, 20, 30]], "category": [2], '
    '"segmentation": [[[8, 4, 28, 4, 28, 34]]]}}',
}


def check_imagefolder(folder: Path, task: str, formats: Sequence[str]) -> None:
    """Refuse a folder that is not laid out as ``imagefolder``, and say what it looks like.

    Args:
        folder: It exists.
        task: ``segmentation``, ``depth``, ``detection`` or ``instances``.
        formats: Names of the formats that there are for this task.

    Raises:
        SFAError: If there are neither parquet files nor ``<split>/metadata.*``, nor, for
            segmentation, ``<split>`` beside ``<split>annot``.
    """
    if task == "segmentation" and any(folder.glob("*annot")):
        return
    if any(folder.glob("metadata.*")) or any(folder.glob("*/metadata.*")):
        return
    for name, signs in _SIGNS.items():
        if any(any(folder.glob(sign)) for sign in signs):
            if name not in formats:
                raise SFAError(f"`{folder}` looks like {name}'s folder, which is not for {task}")
            raise SFAError(f"`{folder}` looks like {name}'s folder; pass dataset_format={name!r}")
    if any(folder.rglob("*.parquet")) or any(folder.rglob("metadata.*")):
        return
    there = sorted(path.name for path in folder.iterdir())
    pairs = "masks in <split>annot/ beside the images of <split>/, " * (task == "segmentation")
    raise SFAError(
        f"`{folder}`: no known layout, there are {there[:8] or 'no files'}; expected {pairs}"
        f"parquet files, or <split>/metadata.jsonl with a line per image like {_METADATA[task]}"
    )
