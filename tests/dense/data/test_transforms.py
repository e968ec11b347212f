# SPDX-License-Identifier: Apache-2.0
"""Transforms: image and mask stay aligned, fill and ignore ids, odd image modes, errors."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfa_peft.dense.data.transforms import (
    IGNORE_INDEX,
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    TrainTransform,
    as_image,
    as_mask,
    colour_jitter,
    to_tensors,
)
from sfa_peft.errors import SFAError


def _blocks(height: int = 40, width: int = 60, side: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of random class ids whose grey value in the image is ten times the id."""
    ids = np.random.default_rng(0).integers(0, 20, (height // side, width // side))
    mask = np.kron(ids, np.ones((side, side))).astype(np.uint8)
    return np.repeat(mask[..., None] * 10, 3, 2), mask


def _grey(pixel_values: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((pixel_values * std[:, None, None] + mean[:, None, None]) * 255).mean(0)


@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(24, 90), st.integers(24, 90)),
    scale=st.sampled_from([(1.0, 1.0), (0.4, 0.8), (1.5, 3.0), (0.5, 2.0)]),
    along=st.sampled_from([0, 1]),
)
def test_the_mask_follows_the_image(
    seed: int, size: tuple[int, int], scale: tuple[float, float], along: int
) -> None:
    # A ramp in both: wherever a pixel goes, its grey value must stay near its id.
    ramp = (4 * np.indices((40, 60))[along]).astype(np.uint8)
    transform = TrainTransform(size, scale=scale, jitter=0.0)

    item = transform(np.repeat(ramp[..., None], 3, 2), ramp, np.random.default_rng(seed))

    assert item["pixel_values"].shape == (3, *size)
    assert item["labels"].shape == size
    labelled = item["labels"] != IGNORE_INDEX
    off = (_grey(item["pixel_values"]) - item["labels"]).abs()[labelled]
    assert labelled.any()
    # At scale 0.4 of 24 pixels one pixel of the result spans 4 of the ramp: half of it, times 4,
    # and the nearest neighbour's own rounding.
    assert off.max() < 14


def test_what_lies_outside_the_image_is_filled_with_ignore_and_the_mean_colour() -> None:
    image, mask = _blocks()

    item = TrainTransform(40, scale=(0.5, 0.5), jitter=0.0)(image, mask, np.random.default_rng(0))

    outside = item["labels"] == IGNORE_INDEX
    assert 0.4 < outside.float().mean() < 0.9
    assert item["pixel_values"][:, outside].abs().max() < 0.02


def test_no_class_is_invented_by_resizing() -> None:
    image, mask = _blocks()

    for seed in range(20):
        item = TrainTransform(33, scale=(0.5, 3.0))(image, mask, np.random.default_rng(seed))
        assert set(item["labels"].unique().tolist()) <= {*np.unique(mask).tolist(), IGNORE_INDEX}


def test_a_flip_mirrors_both() -> None:
    image, mask = _blocks(40, 40)
    plain = TrainTransform(40, scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    flipped = TrainTransform(40, scale=(1.0, 1.0), flip=1.0, jitter=0.0)

    first = plain(image, mask, np.random.default_rng(0))
    second = flipped(image, mask, np.random.default_rng(0))

    assert torch.equal(first["labels"].flip(-1), second["labels"])
    torch.testing.assert_close(first["pixel_values"].flip(-1), second["pixel_values"])


def test_jitter_changes_colours_only_and_zero_changes_nothing() -> None:
    image, mask = _blocks()
    none = TrainTransform(40, scale=(1.0, 1.0), flip=0.0, jitter=0.0)
    some = TrainTransform(40, scale=(1.0, 1.0), flip=0.0, jitter=0.5)
    picture = Image.fromarray(image)

    first, second = (t(image, mask, np.random.default_rng(3)) for t in (none, some))

    assert torch.equal(first["labels"], second["labels"])
    assert not torch.allclose(first["pixel_values"], second["pixel_values"], atol=0.1)
    unchanged = np.asarray(colour_jitter(picture, 0.0, np.random.default_rng(0))).astype(int)
    assert np.abs(unchanged - image).max() <= 1


def test_randomness_comes_from_the_generator_alone() -> None:
    image, mask = _blocks()
    transform = TrainTransform(32)

    first, again, other = (transform(image, mask, np.random.default_rng(i)) for i in (5, 5, 6))

    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_evaluation_resizes_the_image_and_leaves_the_mask() -> None:
    image, mask = _blocks()  # 40 x 60
    transform = EvalTransform(20)

    item = transform(image, mask)

    assert item["pixel_values"].shape == (3, 20, 30)
    assert torch.equal(item["labels"], torch.from_numpy(mask).long())
    assert torch.equal(transform(image, mask)["pixel_values"], item["pixel_values"])
    assert EvalTransform()(image, mask)["pixel_values"].shape == (3, 40, 60)


def test_a_mask_is_resized_only_when_that_is_asked_for() -> None:
    image, mask = _blocks()

    item = EvalTransform(label_size=(20, 30))(image, mask)

    assert item["pixel_values"].shape == (3, 40, 60)
    assert torch.equal(item["labels"], torch.from_numpy(mask[1::2, 1::2]).long())


@pytest.mark.parametrize(
    ("width", "height"), [(683, 512), (512, 683), (640, 640), (2100, 400), (256, 1999), (301, 299)]
)
def test_the_size_of_a_test_image_is_that_of_mmseg(width: int, height: int) -> None:
    image, mask = Image.new("RGB", (width, height)), Image.new("L", (width, height))

    item = EvalTransform(640)(image, mask)

    # mmseg: Resize(scale=(2560, 640), keep_ratio=True), so mmcv's rescale_size.
    long_edge, short_edge = max(height, width), min(height, width)
    factor = min(2560 / long_edge, 640 / short_edge)
    expected = (3, int(height * factor + 0.5), int(width * factor + 0.5))
    assert item["pixel_values"].shape == expected
    assert item["labels"].shape == (height, width)


@pytest.mark.parametrize(
    "transform", [TrainTransform(40, ignore_index=3), EvalTransform(40, ignore_index=3)]
)
def test_the_ignored_id_becomes_255(transform: TrainTransform | EvalTransform) -> None:
    image, mask = _blocks(40, 40)
    mask[:20] = 3

    labels = transform(image, mask, np.random.default_rng(0))["labels"]

    assert 3 not in labels.unique()
    assert (labels == IGNORE_INDEX).any()


def test_normalisation_is_that_of_imagenet() -> None:
    item = to_tensors(np.full((2, 2, 3), 255, np.uint8), np.zeros((2, 2), np.uint8))

    expected = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(item["pixel_values"][:, 0, 0], expected)


def test_grey_palette_alpha_and_16_bit_images_become_rgb() -> None:
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    rgb = Image.fromarray(grey).convert("RGB")

    for image in (
        grey,
        Image.fromarray(grey),
        rgb.quantize(16),
        rgb.convert("RGBA"),
        Image.fromarray(grey.astype(np.uint16) * 256),
    ):
        np.testing.assert_array_equal(np.asarray(as_image(image)), np.asarray(rgb))


def _png16(values: np.ndarray, kind: int) -> bytes:
    """Return a PNG of 16-bit samples (H, W, channels); Pillow does not write those of colours."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _files_of_16_bits(values: np.ndarray) -> dict[str, bytes]:
    files = {
        f"png of kind {kind}": _png16(np.repeat(values[..., None], channels, -1), kind)
        for kind, channels in ((0, 1), (2, 3), (4, 2), (6, 4))
    }
    height, width = values.shape
    files["pgm"] = b"P5 %d %d 65535\n" % (width, height) + values.astype(">u2").tobytes()
    for order in "<>":
        buffer = io.BytesIO()
        Image.fromarray(values.astype(f"{order}u2")).save(buffer, "TIFF")
        files[f"tiff {order}"] = buffer.getvalue()
    return files


def test_sixteen_bits_become_eight_whatever_the_file() -> None:
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # 0x0000, 0x0101, ...
    expected = np.arange(256).reshape(16, 16)

    for name, data in _files_of_16_bits(values).items():
        pixels = np.asarray(as_image(Image.open(io.BytesIO(data))))
        np.testing.assert_array_equal(pixels, np.repeat(expected[..., None], 3, -1), err_msg=name)


def test_a_picture_whose_white_is_not_known_is_refused() -> None:
    with pytest.raises(SFAError, match=r"floats \(mode F\): expected 8 or 16 bits"):
        as_image(Image.fromarray(np.full((2, 2), 0.5, np.float32)))
    with pytest.raises(SFAError, match=r"integers from 7 to 70000 \(mode I\)"):
        as_image(Image.fromarray(np.array([[7, 70000]], np.int32)))


def test_a_palette_mask_keeps_its_indices() -> None:
    ids = np.array([[0, 1], [2, 200]], np.uint8)
    palette = Image.fromarray(ids).convert("P")
    palette.putpalette([(7 * i) % 256 for i in range(768)])

    np.testing.assert_array_equal(np.asarray(as_mask(palette)), ids)
    np.testing.assert_array_equal(np.asarray(as_mask(ids.astype(np.int64))), ids)
    np.testing.assert_array_equal(np.asarray(as_mask(Image.fromarray(ids.astype(np.uint16)))), ids)


def test_image_and_mask_of_different_sizes_are_refused() -> None:
    with pytest.raises(SFAError, match="got 60x40 and 60x39"):
        EvalTransform(32)(_blocks()[0], _blocks()[1][:39])


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((4, 4, 3), np.uint8), "one channel"),
        (Image.new("RGB", (4, 4)), "mode RGB"),
        (np.zeros((4, 4), np.float32), "integer"),
        (np.full((4, 4), 256), "256"),
        (np.full((4, 4), -1), "-1"),
    ],
)
def test_a_mask_that_holds_no_class_ids_is_refused(
    mask: np.ndarray | Image.Image, message: str
) -> None:
    with pytest.raises(SFAError, match=message):
        to_tensors(np.zeros((4, 4, 3), np.uint8), mask)


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)]
)
def test_an_image_array_of_another_kind_is_refused(image: np.ndarray) -> None:
    with pytest.raises(SFAError, match="image array"):
        as_image(image)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(SFAError, match="size"):
        EvalTransform(0)
    with pytest.raises(SFAError, match="scale"):
        TrainTransform(32, scale=(2.0, 1.0))
    with pytest.raises(SFAError, match="flip"):
        TrainTransform(32, flip=1.5)


def test_a_crop_holds_a_labelled_pixel_if_the_mask_has_one() -> None:
    image, _ = _blocks(100, 100)
    mask = np.full((100, 100), IGNORE_INDEX, np.uint8)
    mask[93, 5] = 3

    for seed in range(30):
        transform = TrainTransform(20, scale=(5.0, 5.0), jitter=0.0)  # the image's own pixels
        labels = transform(image, mask, np.random.default_rng(seed))["labels"]
        assert (labels == 3).sum() == 1


def test_a_mask_without_any_label_is_refused_unless_asked_for() -> None:
    image, mask = _blocks()
    mask = np.full_like(mask, 11)

    with pytest.raises(SFAError, match="no labelled pixel in the whole image"):
        TrainTransform(20, ignore_index=11)(image, mask, np.random.default_rng(0))
    kept = TrainTransform(20, ignore_index=11, keep_unlabelled=True)
    assert (kept(image, mask, np.random.default_rng(0))["labels"] == IGNORE_INDEX).all()
