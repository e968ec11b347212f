# SPDX-License-Identifier: Apache-2.0
"""The one loader: formats, tasks, what is skipped, and rows of masks and depth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.data.load import FORMATS, load_dense, usable
from sfa_peft.dense.data.transforms import IGNORE_INDEX
from sfa_peft.errors import SFAError, SFAWarning

_CLASSES = ["road", "sky", "tree"]


def _rows(folder: Path, targets: list[np.ndarray], column: str, split: str = "train") -> Path:
    (folder / split).mkdir()
    lines = []
    for number, target in enumerate(targets):
        Image.new("RGB", (6, 4), (number, 9, 9)).save(folder / split / f"{number}.png")
        Image.fromarray(target).save(folder / split / f"{number}_target.png")
        line = {"image_file_name": f"{number}.png", f"{column}_file_name": f"{number}_target.png"}
        lines.append(json.dumps(line))
    (folder / split / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _masks() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 3, (4, 6), np.uint8) for _ in range(4)]


def _load(task: str, folder: Path, **options):
    return load_dense(task, folder, cache_dir=folder / "cache", **options)


def test_rows_of_depth_are_metres_by_the_scale_given(tmp_path: Path) -> None:
    stored = [np.full((4, 6), 500 * (n + 1), np.uint16) for n in range(3)]
    stored[1][0] = 0

    folder = _rows(tmp_path, stored, "depth")
    data, other = _load("depth", folder), _load("depth", folder, depth_scale=250.0)

    assert data.validation is None
    for index in range(3):
        np.testing.assert_array_equal(data.train[index][1], np.float32(stored[index] / 1000))
        np.testing.assert_array_equal(other.train[index][1], np.float32(stored[index] / 250))


def test_rows_of_masks_keep_classes_and_ignored_ids_become_255(tmp_path: Path) -> None:
    masks = _masks()
    masks[2][1] = 11
    folder = _rows(tmp_path, masks, "label")

    data = _load("segmentation", folder, classes=_CLASSES, ignore_index=11, holdout=0.25)

    assert data.ignore_index == IGNORE_INDEX
    assert (len(data.train), len(data.pick("validation"))) == (3, 1)
    for index in range(3):
        expected = np.where(masks[index + 1] == 11, 255, masks[index + 1])
        np.testing.assert_array_equal(np.asarray(data.train[index][1]), expected)


def test_a_class_outside_the_list_is_named_or_left_out(tmp_path: Path) -> None:
    masks = _masks()
    masks[2][0, 0] = 3
    folder = _rows(tmp_path, masks, "label")
    options = {"classes": _CLASSES, "holdout": 0.25}

    data = _load("segmentation", folder, **options)
    with pytest.raises(SFAError, match=r"/2_target\.png \(row 2.*`: the mask holds ids \[3\]"):
        data.train[1]  # the first of the rows is held out
    with pytest.warns(SFAWarning, match=r"1 left out, first: train, pair 1: `.*2_target\.png"):
        skipped = _load("segmentation", folder, **options, on_error="skip")
    assert len(skipped.train) == 2


def test_everything_bad_is_left_out_and_counted(tmp_path: Path) -> None:
    stored = [np.full((4, 6), 500, np.uint16) for _ in range(6)]
    stored[1][:] = 0  # nothing measured
    folder = _rows(tmp_path, stored, "depth")
    Image.new("L", (6, 4)).save(folder / "train" / "2_target.png")  # a picture of depth
    Image.fromarray(np.ones((5, 6), np.uint16)).save(folder / "train" / "3_target.png")  # larger
    (folder / "train" / "4.png").write_bytes((folder / "train" / "4.png").read_bytes()[:40])

    with pytest.warns(SFAWarning, match="4 left out"):
        data = _load("depth", folder, on_error="skip")

    assert len(data.train) == 2
    assert [data.train[i][0].getpixel((0, 0))[0] for i in range(2)] == [0, 5]
    reasons = ("1_target.png", "2_target.png", "3_target.png", "4.png")
    assert len(data.skipped) == len(reasons)
    for line, reason in zip(data.skipped, reasons, strict=True):
        assert reason in line


def test_a_split_of_which_nothing_is_left_is_an_error(tmp_path: Path) -> None:
    folder = _rows(tmp_path, [np.zeros((4, 6), np.uint16)] * 2, "depth")

    with pytest.raises(SFAError, match=r"none of 2.*0_target\.png.*nothing is labelled"):
        _load("depth", folder, on_error="skip")


def test_good_pairs_are_all_kept_in_order() -> None:
    pairs = [(Image.new("RGB", (6, 4)), Image.fromarray(mask)) for mask in _masks()]

    kept, lines = usable(pairs)

    assert lines == []
    assert [kept[index] for index in range(len(kept))] == pairs


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("panoptic", {}, r"task `panoptic`: imagefolder has \["),
        ("depth", {"dataset_format": "coco"}, "coco has .'detection', 'instances'"),
        ("depth", {"dataset_format": "pascal"}, "expected one of .*'ade20k'"),
        ("depth", {"on_error": "ignore"}, "'raise' or 'skip', got 'ignore'"),
        ("depth", {}, "no known layout"),
        ("detection", {}, "no known layout"),
    ],
)
def test_what_is_not_known_is_refused(tmp_path: Path, task, options, message) -> None:
    with pytest.raises(SFAError, match=message):
        load_dense(task, tmp_path, **options)


@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"imagefolder"}))
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(SFAError, match="gone`: no such folder"):
        load_dense(FORMATS[name][0][0], tmp_path / "gone", dataset_format=name)


def test_a_split_that_is_not_there_is_refused_by_its_name(tmp_path: Path) -> None:
    data = _load("depth", _rows(tmp_path, [np.ones((4, 6), np.uint16)] * 2, "depth"))

    assert data.pick("train") is data.train
    for name in ("test", "validation", "nonsense"):
        with pytest.raises(SFAError, match=rf"split='{name}'.*\['train'\]"):
            data.pick(name)
