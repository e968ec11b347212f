# SPDX-License-Identifier: Apache-2.0
"""Depth maps: what counts as metres, tensors, colours, vertical CutDepth and the crops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfa_peft.dense.data.depth import (
    as_depth,
    depth_to_tensors,
    gamma_brightness_colour,
    kitti_benchmark_crop,
    nyu_border_crop,
    vertical_cut_depth,
)
from sfa_peft.errors import SFAError


def _image(height: int = 20, width: int = 30) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))


def test_what_is_no_distance_becomes_zero() -> None:
    depth = np.array([[0.0, 1.5, np.inf], [np.nan, 9.0, 11.0]])

    np.testing.assert_array_equal(as_depth(depth), np.float32([[0, 1.5, 0], [0, 9, 11]]))
    np.testing.assert_array_equal(
        as_depth(depth, max_depth=10), np.float32([[0, 1.5, 0], [0, 9, 0]])
    )
    assert as_depth(depth).dtype == np.float32


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (np.ones((4, 4), np.uint16), "floating-point metres .* got uint16 .*divide"),
        (np.ones((4, 4, 1)), "floating-point"),
        (-np.ones((4, 4)), "got -1.0"),
    ],
)
def test_raw_integers_other_shapes_and_negative_depth_are_refused(
    depth: np.ndarray, message: str
) -> None:
    with pytest.raises(SFAError, match=message):
        as_depth(depth)


def test_image_and_depth_become_tensors_of_one_size_or_none() -> None:
    depth = np.arange(600, dtype=np.float64).reshape(20, 30)

    item = depth_to_tensors(_image(), depth)

    assert item["pixel_values"].shape == (3, 20, 30)
    assert item["labels"].dtype == torch.float32
    np.testing.assert_array_equal(item["labels"].numpy(), depth)
    with pytest.raises(SFAError, match="30x20 and 20x30"):
        depth_to_tensors(_image(), depth.T)


@given(st.integers(0, 10_000))
def test_cut_depth_puts_one_strip_of_depth_into_the_image(seed: int) -> None:
    image, depth = _image(), np.linspace(0, 10, 600).astype(np.float32).reshape(20, 30)

    cut = vertical_cut_depth(image, depth, np.random.default_rng(seed), max_depth=10.0)

    a, b = np.random.default_rng(seed).random(2)
    left, width = int(a * 30), max(int((30 - a * 30) * b * 0.75), 1)
    before, after = np.asarray(image), np.asarray(cut)
    for column in range(30):
        if left <= column < left + width:
            for channel in range(3):
                np.testing.assert_allclose(
                    after[:, column, channel], depth[:, column] / 10 * 255, atol=1
                )
        else:
            np.testing.assert_array_equal(after[:, column], before[:, column])
    assert left + width <= 30


def test_colours_change_by_the_factors_drawn_and_zero_changes_nothing() -> None:
    image = _image()
    rng = np.random.default_rng(4)

    changed = np.asarray(gamma_brightness_colour(image, 0.2, rng))

    gamma, brightness, *colours = np.random.default_rng(4).uniform(0.8, 1.2, 5)
    for row, column in ((0, 0), (3, 7), (19, 29)):
        for channel in range(3):
            exact = (np.asarray(image)[row, column, channel] / 255) ** gamma
            exact = min(exact * brightness * colours[channel], 1) * 255
            assert abs(changed[row, column, channel] - exact) <= 0.51
    same = gamma_brightness_colour(image, 0.0, np.random.default_rng(0))
    np.testing.assert_array_equal(np.asarray(same), np.asarray(image))


def test_the_crops_are_those_of_the_published_protocols() -> None:
    assert nyu_border_crop(480, 640) == (43, 45, 608, 472)
    # The KITTI development kit's: bottom 352 rows, middle 1216 columns, odd rests to the right.
    assert kitti_benchmark_crop(375, 1242) == (13, 23, 1229, 375)
    assert kitti_benchmark_crop(352, 1216) == (0, 0, 1216, 352)
    with pytest.raises(SFAError, match="640x480 images, got 100x480"):
        nyu_border_crop(480, 100)
    with pytest.raises(SFAError, match="only 1216x351"):
        kitti_benchmark_crop(351, 1216)
