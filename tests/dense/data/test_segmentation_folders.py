# SPDX-License-Identifier: Apache-2.0
"""ADE20K and Cityscapes, from small files in their own layouts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.data.load import load_dense
from sfa_peft.dense.data.segmentation_folders import CITYSCAPES_CLASSES
from sfa_peft.errors import SFAError, SFAWarning

# Of cityscapesScripts' helpers/labels.py, written out as (id, train id) for ids 0 to 33.
_TRAIN_IDS = dict(
    zip(
        range(34),
        [255] * 7
        + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
        + [255, 255, 16, 17, 18],
        strict=True,
    )
)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def ade(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in (("training", 3), ("validation", 2)):
        for n in range(count):
            name = f"ADE_{split[:-3]}_{n:08d}"
            _save(tmp_path / "images" / split / f"{name}.jpg", rng.integers(0, 9, (8, 9, 3), "u1"))
            mask = rng.integers(0, 4, (8, 9), np.uint8)
            _save(tmp_path / "annotations" / split / f"{name}.png", mask)
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.15\t11664\t1172\t1\twall\n"
        "2\t0.10\t6046\t612\t1\tbuilding, edifice\n3\t0.08\t8265\t796\t1\tsky\n"
    )
    return tmp_path


@pytest.fixture
def city(tmp_path: Path) -> Path:
    ids = np.arange(40, dtype=np.uint8).reshape(4, 10) % 34
    ids[3, 9] = 255
    for split in ("train", "val"):
        for n in range(2):
            frame = f"aachen_{n:06d}_000019"
            folder = f"{split}/aachen"
            _save(
                tmp_path / f"leftImg8bit/{folder}/{frame}_leftImg8bit.png",
                np.full((4, 10, 3), n, np.uint8),
            )
            _save(tmp_path / f"gtFine/{folder}/{frame}_gtFine_labelIds.png", ids)
            _save(tmp_path / f"gtFine/{folder}/{frame}_gtFine_instanceIds.png", ids)
    return tmp_path


def test_ade20k_zero_is_ignored_and_the_rest_moves_down(ade: Path) -> None:
    data = load_dense("segmentation", ade, dataset_format="ade20k")

    assert (len(data.train), len(data.pick("validation")), data.test) == (3, 2, None)
    assert data.class_names == ("wall", "building, edifice", "sky")
    assert data.ignore_index == 255
    for index in range(3):
        image, mask = data.train[index]
        stored = np.asarray(
            Image.open(ade / "annotations/training" / f"ADE_train_{index:08d}.png")
        ).astype(int)
        assert image.size == mask.size == (9, 8)
        np.testing.assert_array_equal(np.asarray(mask), np.where(stored == 0, 255, stored - 1))


def test_ade20k_ids_beyond_the_list_are_named(ade: Path) -> None:
    data = load_dense("segmentation", ade, dataset_format="ade20k", classes=["wall", "building"])

    with pytest.raises(SFAError, match=r"ADE_train_0000000\d\.png`: the mask holds ids \[3\]"):
        [data.train[index] for index in range(3)]


def test_ade20k_without_names_or_images_is_refused(ade: Path) -> None:
    (ade / "objectInfo150.txt").write_text("Idx Name\nwall 1\n")
    with pytest.raises(SFAError, match="expected rows of index"):
        load_dense("segmentation", ade, dataset_format="ade20k")
    (ade / "objectInfo150.txt").unlink()
    with pytest.raises(SFAError, match="pass classes="):
        load_dense("segmentation", ade, dataset_format="ade20k")
    for image in (ade / "images/validation").iterdir():
        image.unlink()
    with pytest.raises(SFAError, match=r"validation`: no images"):
        load_dense("segmentation", ade, dataset_format="ade20k", classes=["a", "b", "c"])


def test_cityscapes_ids_become_the_19_train_ids(city: Path) -> None:
    data = load_dense("segmentation", city, dataset_format="cityscapes")

    assert (len(data.train), len(data.pick("validation")), data.test) == (2, 2, None)
    assert data.class_names == CITYSCAPES_CLASSES
    assert len(set(CITYSCAPES_CLASSES)) == 19
    _, mask = data.train[1]
    stored = np.arange(40) % 34
    expected = np.array([_TRAIN_IDS[i] for i in stored]).reshape(4, 10)
    expected[3, 9] = 255  # a licence plate
    np.testing.assert_array_equal(np.asarray(mask), expected)


def test_cityscapes_takes_no_train_ids_for_ids(city: Path) -> None:
    path = next((city / "gtFine/train").rglob("*labelIds.png"))
    _save(path, np.full((4, 10), 60, np.uint8))

    data = load_dense("segmentation", city, dataset_format="cityscapes")

    with pytest.raises(SFAError, match=rf"{path.name}`: the mask holds ids \[60\]"):
        [data.train[index] for index in range(2)]


def test_a_missing_mask_is_an_error_or_left_out_and_counted(city: Path) -> None:
    next((city / "gtFine/train").rglob("*labelIds.png")).unlink()

    with pytest.raises(
        SFAError, match=r"1 files cannot be used, first .*labelIds\.png` is missing"
    ):
        load_dense("segmentation", city, dataset_format="cityscapes")
    with pytest.warns(SFAWarning, match="1 left out, first: .*labelIds"):
        data = load_dense("segmentation", city, dataset_format="cityscapes", on_error="skip")
    assert len(data.train) == 1
    assert len(data.skipped) == 1


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SFAError, match=r"leftImg8bit/train`: no such folder"):
        load_dense("segmentation", tmp_path, dataset_format="cityscapes")
