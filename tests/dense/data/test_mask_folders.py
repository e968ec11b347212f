# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense import load_dense
from sfa_peft.errors import SFAError

NAMES = ["sky", "road", "car"]


def put(path, value, kind="L"):
    """Write an image (or a mask, or depth) whose every pixel is a number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dtype = {"L": np.uint8, "I;16": np.uint16}.get(kind)
    array = np.full((4, 6), value, dtype) if dtype else np.full((4, 6, 3), value, np.uint8)
    Image.fromarray(array).save(path)


ARRANGEMENTS = {
    "one of each": ("images/{}", "masks/{}", ["train"]),
    "splits inside": ("images/{split}/{}", "masks/{split}/{}", ["train", "val", "test"]),
    "splits outside": ("{split}/images/{}", "{split}/labels/{}", ["train", "val"]),
}


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_each_arrangement_gives_every_image_its_own_mask(name, tmp_path):
    images, masks, splits = ARRANGEMENTS[name]
    for number, split in enumerate(splits):
        for i in range(4):
            put(tmp_path / images.format(f"{i}.jpg", split=split), 50 * i, "RGB")
            put(tmp_path / masks.format(f"{i}.png", split=split), (i + number) % 3)
    data = load_dense("segmentation", tmp_path, classes=NAMES, holdout=0.25)
    assert data.class_names == tuple(NAMES)
    found = {"train": data.train, "val": data.validation, "test": data.test}
    for number, split in enumerate(splits):
        for image, mask in found[split]:
            i = round(np.asarray(image).mean() / 50)
            assert (np.asarray(mask) == (i + number) % 3).all()
    assert len(data.validation) == (1 if len(splits) == 1 else 4)


def test_depth_is_in_metres(tmp_path):
    for i in range(2):
        put(tmp_path / "images" / f"{i}.png", 9, "RGB")
        put(tmp_path / "depth" / f"{i}_depth.png", 256 * (i + 1), "I;16")
    data = load_dense("depth", tmp_path, depth_scale=256, holdout=0)
    assert [float(depth[0, 0]) for _, depth in data.train] == [1, 2]


def test_the_id_of_what_is_not_labelled_becomes_255_and_other_ids_are_refused(tmp_path):
    for i, value in enumerate((0, 9, 7)):
        put(tmp_path / "images" / f"{i}.png", 9, "RGB")
        put(tmp_path / "masks" / f"{i}.png", value)
    (tmp_path / "classes.json").write_text('{"classes": ["a", "b"], "ignore_index": 9}')
    train = load_dense("segmentation", tmp_path).train
    assert np.asarray(train[1][1]).max() == 255
    with pytest.raises(SFAError, match=r"masks/2\.png.*7"):
        train[2]


def test_an_image_without_a_mask_is_named(tmp_path):
    put(tmp_path / "images" / "street.png", 9, "RGB")
    (tmp_path / "masks").mkdir()
    with pytest.raises(SFAError, match=r"1 of 1 images .*first `street\.png`"):
        load_dense("segmentation", tmp_path, classes=NAMES)
    (tmp_path / "images" / "street.png").unlink()
    with pytest.raises(SFAError, match=r"images`: no \.jpg"):
        load_dense("segmentation", tmp_path, classes=NAMES)
    with pytest.raises(SFAError, match="no folder images beside one named depth"):
        load_dense("depth", tmp_path, dataset_format="folders")
