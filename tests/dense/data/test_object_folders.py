# SPDX-License-Identifier: Apache-2.0
"""COCO's json and rows of objects: boxes, masks, crowds, empty images, contradictions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.data.load import load_dense
from sfa_peft.dense.data.object_folders import LibraryObjects
from sfa_peft.dense.data.object_transforms import ObjectScaleCrop
from sfa_peft.dense.data.splits import TransformedSplit
from sfa_peft.errors import SFAError, SFAWarning

_SQUARE = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]


def _content() -> dict[str, Any]:
    runs = [0, 5, 75]  # the upper half of the first of 8 columns
    return {
        "images": [
            {"id": 70, "file_name": "a.jpg", "width": 8, "height": 10},
            {"id": 3, "file_name": "b.jpg", "width": 8, "height": 10},
        ],
        "categories": [{"id": 90, "name": "brush"}, {"id": 4, "name": "person"}],
        "annotations": [
            {
                "id": 1,
                "image_id": 70,
                "category_id": 90,
                "bbox": [2, 1, 4, 3],
                "area": 11.5,
                "iscrowd": 0,
                "segmentation": [_SQUARE],
            },
            {
                "id": 2,
                "image_id": 70,
                "category_id": 4,
                "bbox": [0, 0, 1, 5],
                "area": 5,
                "iscrowd": 1,
                "segmentation": {"size": [10, 8], "counts": runs},
            },
        ],
    }


def _write(folder: Path, content: dict[str, Any]) -> Path:
    (folder / "annotations").mkdir(exist_ok=True)
    for name in ("train2017", "val2017"):
        (folder / name).mkdir(exist_ok=True)
        for image in ("a.jpg", "b.jpg"):
            Image.new("RGB", (8, 10), (90, 20, 5)).save(folder / name / image)
        (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(content))
    (folder / "annotations" / "captions_train2017.json").write_text("[]")
    return folder


def test_coco_gives_boxes_classes_masks_and_crowds(tmp_path: Path) -> None:
    data = load_dense("instances", _write(tmp_path, _content()), dataset_format="coco")

    assert data.class_names == ("person", "brush")
    assert (len(data.train), len(data.pick("validation")), data.test) == (2, 2, None)
    image, objects = data.train[0]
    assert image.size == (8, 10)
    np.testing.assert_array_equal(objects.boxes, [[2, 1, 6, 4], [0, 0, 1, 5]])
    np.testing.assert_array_equal(objects.classes, [1, 0])
    np.testing.assert_array_equal(objects.crowd, [False, True])
    np.testing.assert_array_equal(objects.areas, np.float32([11.5, 5]))
    assert objects.image_id == 70
    expected = np.zeros((2, 10, 8), bool)
    expected[0, 1:4, 2:6] = expected[1, :5, 0] = True
    np.testing.assert_array_equal(objects.masks, expected)


def test_an_image_without_annotations_has_no_objects(tmp_path: Path) -> None:
    data = load_dense("instances", _write(tmp_path, _content()), dataset_format="coco")

    _, nothing = data.train[1]

    assert len(nothing) == 0
    assert nothing.masks.shape == (0, 10, 8)
    item = TransformedSplit(data.train, ObjectScaleCrop(16))[1]
    assert item["labels"]["boxes"].shape == (0, 4)


def test_detection_needs_no_masks_and_takes_images_beside_images(tmp_path: Path) -> None:
    content = _content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    folder = _write(tmp_path, content)
    (folder / "images").mkdir()
    for name in ("train2017", "val2017"):
        (folder / name).rename(folder / "images" / name)

    data = load_dense("detection", folder, dataset_format="coco")

    assert data.train[0][1].masks is None
    with pytest.raises(SFAError, match="annotation 1 has no segmentation"):
        load_dense("instances", folder, dataset_format="coco")


def test_areas_are_those_annotated_zero_too_and_else_the_boxes(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0]["area"] = 0
    del content["annotations"][1]["area"]

    data = load_dense("instances", _write(tmp_path, content), dataset_format="coco")

    np.testing.assert_array_equal(data.train[0][1].areas, [0, 5])


def test_boxes_are_cut_to_the_image_and_those_without_area_counted(tmp_path: Path) -> None:
    content = _content()
    content["annotations"][0]["bbox"] = [-1, 1, 9.5, 3]
    content["annotations"][1]["bbox"] = [4, 4, 0, 3]

    with pytest.warns(SFAWarning, match="1 annotations without any area"):
        data = load_dense("detection", _write(tmp_path, content), dataset_format="coco")

    np.testing.assert_array_equal(data.train[0][1].boxes, [[0, 1, 8, 4]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"][1].update(category_id=5), "annotation 2 is of category 5"),
        (lambda c: c["annotations"][1].update(image_id=9), "annotation 2 is of image 9"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2]), "annotation 2: expected a bbox"),
        (lambda c: c["annotations"][1].update(bbox=None), "annotation 2: expected a bbox"),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, "3", 4]),
            "annotation 2: expected a bbox",
        ),
        (
            lambda c: c["annotations"][1].update(bbox=[1, 2, float("nan"), 4]),
            "annotation 2: expected a bbox",
        ),
        (lambda c: c["annotations"].insert(0, 5), "annotation number 0: expected an object, got 5"),
        (
            lambda c: c["images"][1].pop("id"),
            "image number 1: expected `id`, a whole number",
        ),
        (lambda c: c["images"][0].pop("file_name"), "image number 0: expected `file_name`, text"),
        (lambda c: c["images"][0].update(width="8"), "image number 0: expected `width`, a number"),
        (lambda c: c["categories"][0].pop("name"), "category number 0: expected `name`, text"),
        (lambda c: c.pop("categories"), "expected COCO's json"),
        (lambda c: c["images"][1].update(id=70), "two images have one id"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused_at_once(tmp_path, change, message) -> None:
    content = _content()
    change(content)

    with pytest.raises(SFAError, match=rf"instances_train2017\.json`: .*{message}"):
        load_dense("detection", _write(tmp_path, content), dataset_format="coco")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].update(width=9), r"a\.jpg` is 8x10, but .* says 9x10"),
        (lambda c: c["images"][0].update(file_name="gone.jpg"), r"gone\.jpg`: cannot read"),
        (
            lambda c: c["annotations"][0].update(bbox=[20, 1, 4, 3]),
            r"train2017\.json`: image 70 \(`a\.jpg`\), annotation 1: bbox .* no area in the 8x10",
        ),
        (
            lambda c: c["annotations"][0].update(area="big"),
            r"train2017\.json`: image 70 \(`a\.jpg`\), annotation 1: expected an area",
        ),
        (
            lambda c: c["annotations"][0].update(segmentation=[[1, 2]]),
            r"train2017\.json`: image 70 \(`a\.jpg`\), annotation 1: .*3 corners",
        ),
        (
            lambda c: c["annotations"][1]["segmentation"].update(size=[8, 10]),
            r"train2017\.json`: image 70 \(`a\.jpg`\), annotation 2: .*size .* of the image",
        ),
    ],
)
def test_what_does_not_fit_its_image_is_named_or_left_out(tmp_path, change, message) -> None:
    content = _content()
    change(content)
    folder = _write(tmp_path, content)

    data = load_dense("instances", folder, dataset_format="coco")

    with pytest.raises(SFAError, match=message):
        data.train[0]
    with pytest.warns(SFAWarning, match="2 left out, first: train, pair 0"):
        skipped = load_dense("instances", folder, dataset_format="coco", on_error="skip")
    assert (len(skipped.train), len(skipped.pick("validation"))) == (1, 1)


def test_coco_folders_that_are_incomplete_are_named(tmp_path: Path) -> None:
    with pytest.raises(SFAError, match="no instances_<split>"):
        load_dense("detection", tmp_path, dataset_format="coco")
    folder = _write(tmp_path, _content())
    (folder / "annotations/instances_val2017.json").write_text("{")
    with pytest.raises(SFAError, match=r"instances_val2017\.json`: cannot read annotations"):
        load_dense("detection", folder, dataset_format="coco")
    other = _content()
    other["categories"][0]["name"] = "comb"
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(other))
    with pytest.raises(SFAError, match="not those of the other split"):
        load_dense("detection", folder, dataset_format="coco")
    (folder / "annotations/instances_val2017.json").rename(
        folder / "annotations/instances_minival.json"
    )
    with pytest.raises(SFAError, match="does not begin with train, val or test"):
        load_dense("detection", folder, dataset_format="coco")


def _rows(folder: Path, objects: list[dict[str, Any]]) -> Path:
    (folder / "train").mkdir()
    lines = []
    for number, entry in enumerate(objects):
        Image.new("RGB", (8, 10)).save(folder / "train" / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "objects": entry}))
    (folder / "train" / "metadata.jsonl").write_text("\n".join(lines))
    (folder / "classes.json").write_text('["person", "brush"]')
    return folder


def test_rows_of_objects_are_read_with_their_masks(tmp_path: Path) -> None:
    objects = [
        {"bbox": [[2, 1, 4, 3]], "category": [1], "segmentation": [[_SQUARE]]},
        {
            "bbox": [[0, 0, 1, 1], [2, 1, 4, 3]],
            "category": [0, 1],
            "segmentation": [[[0, 0, 1, 0, 1, 1, 0, 1]], [_SQUARE]],
        },
        {"bbox": [], "category": [], "segmentation": []},
    ]

    data = load_dense(
        "instances", _rows(tmp_path, objects), holdout=0.34, cache_dir=tmp_path / "cache"
    )

    assert data.class_names == ("person", "brush")
    assert (len(data.train), len(data.pick("validation"))) == (2, 1)
    _, two = data.train[0]
    np.testing.assert_array_equal(two.boxes, [[0, 0, 1, 1], [2, 1, 6, 4]])
    np.testing.assert_array_equal(two.classes, [0, 1])
    np.testing.assert_array_equal(two.areas, [1, 12])
    assert two.masks.sum((1, 2)).tolist() == [1, 12]
    assert len(data.train[1][1]) == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"bbox": [[0, 0, 1, 1]], "category": [2]}, "category 2 is none of the 2 classes"),
        ({"bbox": [[0, 0, 1]], "category": [1]}, "expected bbox of 4 numbers"),
        ({"bbox": [[0, 0, 1, 1]], "kind": [1]}, "and one of"),
        ({"bbox": [[0, 0, 1, 1]], "category": [1, 0]}, "lists of one length"),
        ({"bbox": [[0, 0, 0, 1]], "category": [1]}, "object 0: bbox .* has no area in the 8x10"),
    ],
)
def test_rows_that_cannot_be_used_are_named(tmp_path: Path, entry, message: str) -> None:
    data = load_dense("detection", _rows(tmp_path, [entry]), cache_dir=tmp_path / "cache")

    with pytest.raises(SFAError, match=rf"0\.png \(row 0, column `objects`\).*{message}"):
        data.train[0]


def test_masks_without_the_library_are_refused_when_loading_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    (tmp_path / "coco").mkdir()
    (tmp_path / "rows").mkdir()
    coco_folder, rows = _write(tmp_path / "coco", _content()), _rows(tmp_path / "rows", [{}])

    for folder, form in ((coco_folder, "coco"), (rows, "imagefolder")):
        for on_error in ("raise", "skip"):
            with pytest.raises(SFAError, match=r"sfa-peft\[detection\]"):
                load_dense(
                    "instances",
                    folder,
                    dataset_format=form,
                    on_error=on_error,
                    cache_dir=tmp_path / "cache",
                )
    assert len(load_dense("detection", coco_folder, dataset_format="coco").train[0][1]) == 2


def test_rows_with_one_dict_per_object_are_the_same(tmp_path: Path) -> None:
    Image.new("RGB", (8, 10)).save(tmp_path / "a.png")
    image = {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}
    boxes, classes = [[0, 0, 1, 1], [2, 1, 4, 3]], [0, 1]
    columns = {"bbox": boxes, "category": classes}
    dicts = [{"bbox": b, "category": c} for b, c in zip(boxes, classes, strict=True)]
    rows = [{"image": image, "objects": objects} for objects in (columns, dicts, None)]

    split = LibraryObjects(rows, "image", "objects", 2, with_masks=False)

    for index in range(2):
        np.testing.assert_array_equal(split[index][1].boxes, [[0, 0, 1, 1], [2, 1, 6, 4]])
        np.testing.assert_array_equal(split[index][1].classes, classes)
    assert len(split[2][1]) == 0
