# SPDX-License-Identifier: Apache-2.0
"""The three folder layouts on small files made here, class files, and errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.data.datasets import SegmentationData, load_segmentation, read_classes
from sfa_peft.errors import SFAError

NAMES = ["sky", "road", "car"]
SPLITS = {"train": 4, "val": 2, "test": 1}


def _pair(split: str, index: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((len(split), index))
    return rng.integers(0, 256, (8, 12, 3), np.uint8), rng.integers(0, 4, (8, 12)).astype(np.uint8)


def _pairs_folder(root: Path) -> Path:
    for split, count in SPLITS.items():
        (root / split).mkdir(parents=True)
        (root / f"{split}annot").mkdir()
        for i in range(count):
            image, mask = _pair(split, i)
            Image.fromarray(image).save(root / split / f"{i}.png")
            Image.fromarray(mask).save(root / f"{split}annot" / f"{i}.png")
    (root / "meta.json").write_text(json.dumps({"classes": NAMES, "ignore": 3, "splits": {}}))
    return root


def _image_folder(root: Path) -> Path:
    for split, count in SPLITS.items():
        folder = root / split
        (folder / "masks").mkdir(parents=True)
        lines = []
        for i in range(count):
            image, mask = _pair(split, i)
            Image.fromarray(image).save(folder / f"{i}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{i}.png")
            row = {"image_file_name": f"{i}.png", "label_file_name": f"masks/{i}.png"}
            lines.append(json.dumps(row))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    id2label = {str(i): name for i, name in enumerate(NAMES)}
    (root / "classes.json").write_text(json.dumps({"id2label": id2label, "ignore_index": 3}))
    return root


def _parquet_folder(root: Path) -> Path:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir()
    for split, count in SPLITS.items():
        pairs = [tuple(map(Image.fromarray, _pair(split, i))) for i in range(count)]
        rows = {"image": [p[0] for p in pairs], "annotation": [p[1] for p in pairs]}
        features = Features({"image": ImageFeature(), "annotation": ImageFeature()})
        data = Dataset.from_dict(rows, features=features)
        data.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    (root / "classes.json").write_text(json.dumps({"classes": NAMES, "ignore_index": 3}))
    return root


LAYOUTS = {"pairs": _pairs_folder, "imagefolder": _image_folder, "parquet": _parquet_folder}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_pairs_that_were_written(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "data")

    data = load_segmentation(folder, cache_dir=tmp_path / "cache")

    assert data.class_names == tuple(NAMES)
    assert data.ignore_index == 3
    for split, pairs in (("train", data.train), ("val", data.validation), ("test", data.test)):
        assert pairs is not None
        assert len(pairs) == SPLITS[split]
        for i in range(len(pairs)):
            image, mask = pairs[i]
            expected_image, expected_mask = _pair(split, i)
            np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected_image)
            np.testing.assert_array_equal(np.asarray(mask), expected_mask)


def test_iterating_over_a_split_ends(tmp_path: Path) -> None:
    data = load_segmentation(_pairs_folder(tmp_path / "data"))

    assert len(list(data.train)) == 4  # type: ignore[call-overload]


def test_without_a_validation_split_a_share_of_train_is_held_out(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    (folder / "valannot").rename(folder / "unused")

    data = load_segmentation(folder, holdout=0.5)

    assert (len(data.train), len(data.validation)) == (2, 2)
    held, kept = ([np.asarray(s[i][1]) for i in range(2)] for s in (data.validation, data.train))
    for position, mask in enumerate((held[0], kept[0], held[1], kept[1])):
        np.testing.assert_array_equal(mask, _pair("train", position)[1])
    with pytest.raises(SFAError, match="holdout"):
        load_segmentation(folder)


def test_stated_classes_and_ignore_index_win_over_the_file(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    (tmp_path / "names.json").write_text(json.dumps(["a", "b", "c"]))

    by_list = load_segmentation(folder, classes=["x", "y", "z"], ignore_index=7)
    by_file = load_segmentation(folder, classes=tmp_path / "names.json")

    assert (by_list.class_names, by_list.ignore_index) == (("x", "y", "z"), 7)
    assert (by_file.class_names, by_file.ignore_index) == (("a", "b", "c"), 255)


@pytest.mark.parametrize(
    ("content", "ignore"),
    [
        (NAMES, None),
        ({"id2label": {"2": "car", "0": "sky", "1": "road"}}, None),
        ({"1": "road", "0": "sky", "2": "car"}, None),
        ({"classes": NAMES, "ignore_index": 11}, 11),
        ({"classes": NAMES, "ignore": 0, "splits": {"train": []}}, 0),
    ],
)
def test_class_files_of_every_shape_are_read(
    content: Any, ignore: int | None, tmp_path: Path
) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps(content))

    assert read_classes(path) == (tuple(NAMES), ignore)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "cannot read class names"),
        ("[]", "expected a list of names"),
        ("[1, 2]", "expected a list of names"),
        ('{"id2label": {"0": "a", "2": "b"}}', "without a gap"),
        ('{"names": ["a"]}', "not class ids"),
    ],
)
def test_a_bad_class_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(content)

    with pytest.raises(SFAError, match=rf"names\.json.*{message}"):
        read_classes(path)


def _cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:60])
    return path.name


@pytest.mark.parametrize("layout", ["pairs", "imagefolder"])
def test_a_corrupt_image_is_named(layout: str, tmp_path: Path) -> None:
    folder = LAYOUTS[layout](tmp_path / "data")
    data: SegmentationData = load_segmentation(folder, cache_dir=tmp_path / "cache")
    name = _cut(folder / "train" / "2.png")

    data.train[1]
    with pytest.raises(SFAError, match=rf"{name}.*cannot read this image"):
        data.train[2]


def test_a_missing_mask_is_named(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    (folder / "trainannot" / "1.png").unlink()

    with pytest.raises(SFAError, match=r"1 images have no mask, first `1\.png`"):
        load_segmentation(folder)


def test_a_folder_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SFAError, match="no known layout"):
        load_segmentation(tmp_path, classes=NAMES)


def test_missing_class_names_are_asked_for(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    (folder / "meta.json").unlink()

    with pytest.raises(SFAError, match="no class names; pass classes="):
        load_segmentation(folder)
    with pytest.raises(SFAError, match="at least one"):
        load_segmentation(tmp_path, classes=[])


def test_a_missing_training_split_is_reported(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    (folder / "trainannot").rename(folder / "unused")

    with pytest.raises(SFAError, match=r"no training split; found \['test', 'validation'\]"):
        load_segmentation(folder)


def test_a_split_folder_without_images_is_reported(tmp_path: Path) -> None:
    folder = _pairs_folder(tmp_path / "data")
    for path in (folder / "train").iterdir():
        path.unlink()

    with pytest.raises(SFAError, match="train`: no"):
        load_segmentation(folder)


def test_a_missing_column_is_reported_with_those_there_are(tmp_path: Path) -> None:
    folder = _parquet_folder(tmp_path / "data")

    with pytest.raises(SFAError, match=r"no column depth among \['annotation', 'image'\]"):
        load_segmentation(folder, label_column="depth", cache_dir=tmp_path / "cache")


def test_a_parquet_file_of_no_split_is_reported(tmp_path: Path) -> None:
    (tmp_path / "part-0.parquet").touch()

    with pytest.raises(SFAError, match="named after a split"):
        load_segmentation(tmp_path, classes=NAMES)
