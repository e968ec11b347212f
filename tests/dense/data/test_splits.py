# SPDX-License-Identifier: Apache-2.0
"""Splits with a transform over them, and decoding errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sfa_peft.dense.data.splits import LibrarySplit, PairFolder, SubSplit, TransformedSplit
from sfa_peft.dense.data.transforms import EvalTransform, TrainTransform
from sfa_peft.errors import SFAError


@pytest.fixture
def folder(tmp_path: Path) -> PairFolder:
    rng = np.random.default_rng(0)
    pairs = []
    for i in range(4):
        image, mask = tmp_path / f"{i}.jpg", tmp_path / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(image)
        Image.fromarray(rng.integers(0, 5, (20, 30)).astype(np.uint8)).save(mask)
        pairs.append((image, mask))
    return PairFolder(pairs)


def test_a_loader_batches_a_transformed_split(folder: PairFolder) -> None:
    loader = DataLoader(TransformedSplit(folder, EvalTransform(16)), batch_size=4)

    (batch,) = loader

    assert batch["pixel_values"].shape == (4, 3, 16, 24)
    assert batch["labels"].shape == (4, 20, 30)


def test_augmentation_depends_on_seed_epoch_and_index_only(folder: PairFolder) -> None:
    transform = TrainTransform(16)
    first = TransformedSplit(folder, transform)
    pixels = first[1]["pixel_values"]
    first.set_epoch(1)

    assert torch.equal(TransformedSplit(folder, transform)[1]["pixel_values"], pixels)
    assert not torch.equal(TransformedSplit(folder, transform, seed=1)[1]["pixel_values"], pixels)
    assert not torch.equal(first[1]["pixel_values"], pixels)


def test_some_pairs_of_a_split_come_in_the_order_asked_for(folder: PairFolder) -> None:
    part = SubSplit(folder, (3, 1))

    assert len(part) == 2
    np.testing.assert_array_equal(np.asarray(part[1][1]), np.asarray(folder[1][1]))


def test_a_rotated_photograph_is_put_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # Orientation: turn by 90 degrees.
    image.save(tmp_path / "a.jpg", exif=exif)
    Image.new("L", (20, 30)).save(tmp_path / "a.png")

    turned, mask = PairFolder([(tmp_path / "a.jpg", tmp_path / "a.png")])[0]

    assert turned.size == mask.size == (20, 30)


def test_a_file_that_is_no_image_is_named(folder: PairFolder) -> None:
    folder.pairs[2][1].write_bytes(b"not a picture")

    with pytest.raises(SFAError, match=r"2\.png.*cannot read"):
        TransformedSplit(folder, EvalTransform(16))[2]


def test_a_mask_of_another_size_is_reported_with_both_files(folder: PairFolder) -> None:
    Image.new("L", (30, 19)).save(folder.pairs[3][1])

    with pytest.raises(SFAError, match=r"3\.png` is 30x19, but its image `.*3\.(png|jpg)` 30x20"):
        TransformedSplit(folder, EvalTransform(16))[3]


def test_a_mask_that_a_transform_refuses_is_named(folder: PairFolder) -> None:
    Image.new("L", (30, 20), 255).save(folder.pairs[1][1])  # nothing labelled
    part = SubSplit(folder, (3, 1))

    with pytest.raises(SFAError, match=r"/1\.png`: no labelled pixel in the whole image"):
        TransformedSplit(part, TrainTransform(16))[1]
    with pytest.raises(SFAError, match="pair 0: no labelled pixel"):  # a split that has no files
        TransformedSplit([part[1]], TrainTransform(16))[0]


def test_an_empty_or_corrupt_cell_of_a_library_row_is_named() -> None:
    rows = [{"image": {"bytes": b"junk", "path": None}, "label": None}]

    with pytest.raises(SFAError, match=r"embedded image \(row 0, column `image`\)"):
        LibrarySplit(rows, "image", "label")[0]
    with pytest.raises(SFAError, match="row 0 has no `label`"):
        LibrarySplit(rows, "label", "label")[0]
