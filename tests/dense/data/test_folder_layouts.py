# SPDX-License-Identifier: Apache-2.0
"""A folder is read by what it looks like; or the error shows what is there and what would do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from sfa_peft.dense.data.folder_layouts import recognise
from sfa_peft.dense.data.load import FORMATS, load_dense
from sfa_peft.errors import SFAError


def _coco(folder: Path) -> Path:
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 40}],
        "categories": [{"id": 3, "name": "brush"}],
        "annotations": [],
    }
    for split in ("train", "val"):
        (folder / split).mkdir()
        Image.new("RGB", (40, 40)).save(folder / split / "a.png")
        path = folder / "annotations" / f"instances_{split}.json"
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("task", ["detection", "instances"])
def test_cocos_folder_is_read_without_an_option(tmp_path: Path, task: str) -> None:
    folder = _coco(tmp_path)

    assert load_dense(task, folder).class_names == ("brush",)
    assert load_dense(task, folder, dataset_format="coco").class_names == ("brush",)
    with pytest.raises(SFAError, match=r"looks like coco's folder; pass dataset_format='coco'$"):
        load_dense(task, folder, dataset_format="imagefolder")
    with pytest.raises(SFAError, match="looks like coco's folder, which is not for depth"):
        load_dense("depth", folder)


@pytest.mark.parametrize(
    ("made", "task", "name"),
    [
        ("annotations/training", "segmentation", "ade20k"),
        ("leftImg8bit", "segmentation", "cityscapes"),
        ("nyu_depth_v2_labeled.mat", "depth", "nyuv2"),
        ("nyudepthv2_train_files_with_gt.txt", "depth", "nyuv2"),
        ("eigen_train_files_with_gt.txt", "depth", "kitti"),
        ("data.yaml", "detection", "yolo"),
        ("SegmentationClass", "segmentation", "voc"),
        ("images/../masks", "segmentation", "folders"),
        ("train/images/../depth", "depth", "folders"),
    ],
)
def test_folders_of_other_data_sets_are_recognised(
    tmp_path: Path, made: str, task: str, name: str
) -> None:
    *inner, last = made.split("/../")
    for part in (*inner, str(Path(*inner).parent / last) if inner else last):
        (tmp_path / part).mkdir(parents=True)

    assert recognise(tmp_path, task, FORMATS) == name
    with pytest.raises(SFAError, match="which is not for"):
        recognise(tmp_path, task, ["imagefolder"])


@pytest.mark.parametrize("task", ["segmentation", "depth", "detection", "instances"])
def test_another_folder_is_shown_with_what_would_do_and_that_works(
    tmp_path: Path, task: str
) -> None:
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for name in ("photos/a.jpg", "photos/b.jpg", "photos/c.xml", "notes.txt"):
        (tmp_path / name).touch()

    shown = r"There: \(1 \.txt\), photos/ \(2 \.jpg, 1 \.xml, more/\)\. Would do for " + task
    with pytest.raises(SFAError, match=shown) as caught:
        load_dense(task, tmp_path)

    found = re.search(
        r"<split>/metadata\.jsonl with a line per image like (\{.*\})", str(caught.value)
    )
    assert found is not None
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metadata.jsonl").write_text(found[1])
    Image.new("RGB", (40, 40)).save(tmp_path / "train" / "1.jpg")
    Image.new("L", (40, 40)).save(tmp_path / "train" / "1_mask.png")
    Image.new("I;16", (40, 40)).save(tmp_path / "train" / "1_depth.png")
    classes = None if task == "depth" else ["a", "b", "c"]
    if task == "segmentation":  # these need a validation split
        (tmp_path / "validation").mkdir()
        for file in (tmp_path / "train").iterdir():
            (tmp_path / "validation" / file.name).write_bytes(file.read_bytes())
    if classes is not None:
        with pytest.raises(SFAError, match=r"no class names; pass classes= or"):
            load_dense(task, tmp_path)
    data = load_dense(task, tmp_path, classes=classes, cache_dir=tmp_path / "cache")
    assert data.train[0][0].size == (40, 40)


def test_masks_beside_images_and_parquet_are_known(tmp_path: Path) -> None:
    (tmp_path / "trainannot").mkdir()
    assert recognise(tmp_path, "segmentation", ["imagefolder"]) == "imagefolder"
    with pytest.raises(SFAError, match="no known layout"):
        recognise(tmp_path, "instances", ["imagefolder"])

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.parquet").touch()
    assert recognise(tmp_path, "instances", ["imagefolder"]) == "imagefolder"
