# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense import load_dense
from sfa_peft.errors import SFAError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
OBJECTS = {
    "a": [("dog", 0, 1, 1, 40, 30), ("cat", 1, 11, 6, 20, 25)],  # the first covers all
    "b": [],
    "c": [("cat", 0, 2.5, 1, 40, 30)],
}


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("Annotations", "JPEGImages", "SegmentationClass", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets" / "Segmentation").mkdir()
    for name, objects in OBJECTS.items():
        text = "".join(OBJECT.format(*entry) for entry in objects)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
        Image.new("RGB", (40, 30)).save(root / "JPEGImages" / f"{name}.jpg")
    for kind in ("Main", "Segmentation"):
        (root / "ImageSets" / kind / "train.txt").write_text("a\nb\n")
        (root / "ImageSets" / kind / "val.txt").write_text("c\n")
    for name, value in zip("abc", (0, 15, 255), strict=True):
        mask = Image.fromarray(np.full((30, 40), value, np.uint8), mode="P")
        mask.putpalette([5, 99, 200] * 256)
        mask.save(root / "SegmentationClass" / f"{name}.png")
    return root


def test_boxes_count_pixels_from_the_edge(root):
    data = load_dense("detection", root.parents[1])
    assert data.class_names == ("cat", "dog")
    (image, first), (_, none) = data.train
    assert image.size == (40, 30)
    assert first.boxes.tolist() == [[0, 0, 40, 30], [10, 5, 20, 25]]
    assert first.classes.tolist() == [1, 0]
    assert first.crowd.tolist() == [False, True]
    assert len(none) == 0
    assert [len(objects) for _, objects in data.validation] == [1]


def test_masks_are_the_stored_numbers(root):
    data = load_dense("segmentation", root)
    assert data.class_names[:2] == ("background", "aeroplane")
    assert [np.asarray(mask).max() for _, mask in data.train] == [0, 15]
    assert [np.asarray(mask).max() for _, mask in data.validation] == [255]


def test_without_lists_all_are_for_training(root):
    for path in root.glob("ImageSets/*/*.txt"):
        path.unlink()
    data = load_dense("detection", root, holdout=0.34)
    assert (len(data.train), len(data.validation)) == (2, 1)


def test_what_is_wrong_is_named(root):
    (root / "ImageSets" / "Main" / "val.txt").write_text("c\nd\n")
    with pytest.raises(SFAError, match=r"d\.xml"):
        load_dense("detection", root)
    (root / "ImageSets" / "Main" / "val.txt").unlink()
    train = load_dense("detection", root, classes=["cat"], holdout=0.5).train
    with pytest.raises(SFAError, match=r"a\.xml`: class 'dog' is none of"):
        load_dense("detection", root, classes=["cat"]).train[0]
    assert len(train) == 1
    (root / "Annotations" / "a.xml").write_text("<annotation><object><name>cat</name></object>")
    with pytest.raises(SFAError, match=r"a\.xml`: cannot be read as xml"):
        load_dense("detection", root)
    text = "<annotation><object><name>cat</name></object></annotation>"
    (root / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(SFAError, match=r"a\.xml`: an object without the four numbers"):
        load_dense("detection", root).train[0]
    (root / "Annotations" / "a.xml").write_text("<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>")
    with pytest.raises(SFAError, match=r"a\.xml`: no annotation of VOC"):
        load_dense("detection", root)


def test_of_several_years_one_is_to_be_named(root):
    (root.parent / "VOC2007" / "SegmentationClass").mkdir(parents=True)
    with pytest.raises(SFAError, match=r"2 years of VOC; name one, such as .*VOC2007"):
        load_dense("segmentation", root.parents[1])
    with pytest.raises(SFAError, match=r"neither Annotations/\*\.xml nor SegmentationClass"):
        load_dense("detection", root / "JPEGImages", dataset_format="voc")
