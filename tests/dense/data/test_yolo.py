# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense import load_dense
from sfa_peft.dense.data.yolo import labels_of
from sfa_peft.errors import SFAError

pytest.importorskip("yaml")
LINES = {"a": "1 0.5 0.5 0.5 1\n\n0 0.25 0.1 0.5 0.2\n", "b": None, "c": "0 0.1 0.1 0.2 0.2"}
YAML = "path: /on/another/machine\ntrain: images/train\nval: images/val\nnames: {0: cat, 1: dog}\n"


@pytest.fixture
def root(tmp_path):
    for split, names in (("train", "ab"), ("val", "c")):
        for name in names:
            for kind in ("images", "labels"):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 20)).save(tmp_path / "images" / split / f"{name}.jpg")
            if LINES[name] is not None:
                (tmp_path / "labels" / split / f"{name}.txt").write_text(LINES[name])
    (tmp_path / "data.yaml").write_text(YAML)
    return tmp_path


def test_boxes_are_in_pixels(root):
    data = load_dense("detection", root)
    assert data.class_names == ("cat", "dog")
    (image, objects), (_, none) = data.train
    assert image.size == (40, 20)
    np.testing.assert_allclose(objects.boxes, [[10, 0, 30, 20], [0, 0, 20, 4]], atol=1e-5)
    assert objects.classes.tolist() == [1, 0]
    assert len(none) == 0
    assert len(data.validation) == 1


def test_outlines_are_masks_and_boxes_around_them(root):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    for path in (root / "labels").rglob("*.txt"):
        path.write_text("1 0.25 0.25 0.75 0.25 0.75 0.75 0.25 0.75")
    _, objects = load_dense("instances", root).train[0]
    wanted = np.zeros((20, 40), bool)
    wanted[5:15, 10:30] = True
    assert np.array_equal(objects.masks[0], wanted)
    assert objects.areas.tolist() == [200]
    _, objects = load_dense("detection", root).train[0]
    assert objects.boxes.tolist() == [[10, 5, 30, 15]]


def test_paths_are_those_that_ultralytics_writes(root):
    (root / "lists.txt").write_text("./images/train/a.jpg\n")
    (root / "data.yaml").write_text("train: lists.txt\nval: ../images/val\nnames: [cat, dog]")
    data = load_dense("detection", root)
    assert (len(data.train), len(data.validation)) == (1, 1)
    assert len(data.train[0][1]) == 2
    assert labels_of(Path("images/x/images/a.b.jpg")) == Path("images/x/labels/a.b.txt")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.1 0.1", "line 1: class 2, but there are 2 classes"),
        ("0 0.5 x 0.1 0.1", "line 1: expected numbers"),
        ("0 0.5 0.5 30 20", "line 1: expected shares of the image"),
        ("0 0.5 0.5 0.1", "line 1: expected x y of three corners or more, or centre and size"),
    ],
)
def test_a_line_that_is_wrong_is_named(line, message, root):
    (root / "labels" / "train" / "a.txt").write_text(line)
    with pytest.raises(SFAError, match=rf"a\.txt`, {message}"):
        load_dense("detection", root).train[0]


def test_boxes_are_no_masks(root):
    pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    with pytest.raises(SFAError, match=r"a\.txt`, line 1: expected x y of three corners or more"):
        load_dense("instances", root).train[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train", "expected names, a list"),
        ("names: {a: b}", "expected names, a list"),
        ("[1, 2]", "expected names, train and val"),
        ("names: [a]\ntrain: gone", "'gone' is neither in"),
        ("names: [a]\ntrain: labels", r"labels`: no \.jpg"),
        ("{", "cannot be read"),
    ],
)
def test_a_file_that_is_wrong_is_named(text, message, root):
    (root / "data.yaml").write_text(text)
    with pytest.raises(SFAError, match=message):
        load_dense("detection", root)
