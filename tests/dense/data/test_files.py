# SPDX-License-Identifier: Apache-2.0
"""Single files: grey, palette, 16-bit, EXIF, damaged; ids that are no classes; depth scales."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfa_peft.dense.data.files import (
    id_table,
    map_ids,
    metres_of,
    read_depth,
    read_image,
    read_mask,
)
from sfa_peft.dense.data.splits import LibrarySplit, PairFolder
from sfa_peft.dense.data.transforms import as_image
from sfa_peft.errors import SFAError


def test_a_turned_photograph_comes_upright(tmp_path: Path) -> None:
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255  # left half white
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # Orientation: to be turned by 90 degrees, clockwise.
    image.save(tmp_path / "turned.png", exif=exif)

    upright = np.asarray(read_image(tmp_path / "turned.png"))

    assert upright.shape == (30, 20, 3)
    assert (upright[:15] == 255).all()
    assert (upright[15:] == 0).all()


@pytest.mark.parametrize("mode", ["L", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_images_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    grey = Image.fromarray(np.full((6, 8), 204, np.uint8))
    if mode == "I;16":
        image = Image.fromarray(np.full((6, 8), 204 * 256, np.uint16))
    else:
        image = grey.convert("RGB").convert(mode)
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)

    pixels = np.asarray(as_image(read_image(path)))

    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - 204).max() <= 5


def test_a_picture_of_floats_is_refused_by_its_name(tmp_path: Path) -> None:
    image, mask = tmp_path / "a.tiff", tmp_path / "m.png"
    Image.fromarray(np.ones((4, 5), np.float32)).save(image)
    Image.new("L", (5, 4)).save(mask)
    rows = [{"image": {"bytes": None, "path": str(image)}, "mask": {"bytes": None, "path": mask}}]

    for split in (PairFolder([(image, mask)]), LibrarySplit(rows, "image", "mask")):
        with pytest.raises(SFAError, match=r"/a\.tiff.*`: a picture of floats"):
            split[0]


def test_palette_masks_give_their_indices(tmp_path: Path) -> None:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    mask = Image.fromarray(ids)
    mask.putpalette([v for i in range(256) for v in (255 - i, i, 7)])
    mask.save(tmp_path / "p.png")

    read = read_mask(tmp_path / "p.png", id_table({i: i for i in range(12)}))

    np.testing.assert_array_equal(np.asarray(read), ids)


@given(st.integers(0, 10_000))
def test_ids_are_mapped_as_pixel_by_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    known = {int(i): n for n, i in enumerate(rng.permutation(256)[: rng.integers(1, 60)])}
    ignored = [int(i) for i in range(0, 256, 5) if i not in known]
    stored = rng.choice([*known, *ignored], (5, 7)).astype(np.uint8)

    mapped = np.asarray(map_ids(Image.fromarray(stored), id_table(known, ignored), "m"))

    for got, was in zip(mapped.ravel(), stored.ravel(), strict=True):
        assert got == known.get(int(was), 255)


def test_ids_outside_the_list_are_named() -> None:
    mask = Image.fromarray(np.array([[0, 1], [2, 77]], np.uint8))

    with pytest.raises(SFAError, match=r"`a\.png`.* holds ids \[2, 77\].*expected 0 to 1, 255\."):
        map_ids(mask, id_table({0: 0, 1: 1}, (255,)), "`a.png`")
    with pytest.raises(SFAError, match=r"`a\.png`.*one channel"):
        map_ids(mask.convert("RGB"), id_table({0: 0}), "`a.png`")


@pytest.mark.parametrize(
    ("known", "ignored"), [({0: 0}, (-1,)), ({256: 0}, ()), ({0: 255}, ()), ({0: 0}, (300,))]
)
def test_tables_with_ids_out_of_range_are_refused(known: dict, ignored: tuple) -> None:
    with pytest.raises(SFAError, match=r"0, 255|at most 255"):
        id_table(known, ignored)


@pytest.mark.parametrize("scale", [1000.0, 256.0])
def test_sixteen_bit_depth_is_divided_and_zeros_stay(tmp_path: Path, scale: float) -> None:
    stored = np.array([[0, 1, 256], [1000, 40000, 65535]], np.uint16)
    Image.fromarray(stored).save(tmp_path / "d.png")

    depth = read_depth(tmp_path / "d.png", scale)

    assert depth.dtype == np.float32
    for got, was in zip(depth.ravel(), stored.ravel(), strict=True):
        assert got == np.float32(int(was) / scale)
    assert depth[0, 0] == 0


def test_float_depth_is_metres_already(tmp_path: Path) -> None:
    metres = np.array([[0, 1.25], [3.5, 80]], np.float32)
    Image.fromarray(metres).save(tmp_path / "d.tiff")

    np.testing.assert_array_equal(read_depth(tmp_path / "d.tiff", 1000.0), metres)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_picture_of_depth_is_not_depth(mode: str) -> None:
    with pytest.raises(SFAError, match=f"`d`: expected depth as 16-bit.* got mode {mode}"):
        metres_of(Image.new(mode, (4, 4)), 1000.0, "d")


@pytest.mark.parametrize("read", [read_image, read_mask, lambda p: read_depth(p, 256.0)])
def test_missing_empty_cut_and_foreign_files_are_named(tmp_path: Path, read) -> None:
    good = tmp_path / "good.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (50, 50), np.uint8)).save(good)
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_bytes(b"<html>404</html>")

    for name in ("cut.png", "empty.png", "text.png", "gone.png"):
        with pytest.raises(SFAError, match=rf"{name}`: cannot read this image"):
            read(tmp_path / name)
