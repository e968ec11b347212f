# SPDX-License-Identifier: Apache-2.0
"""Objects: boxes recomputed from masks pixel by pixel after every move, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfa_peft.dense.data.objects import (
    Objects,
    crop_objects,
    flip_objects,
    mask_boxes,
    objects_of_masks,
    resize_objects,
)
from sfa_peft.errors import SFAError


def _slow_box(mask: np.ndarray) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def _random_objects(seed: int, height: int = 23, width: int = 31) -> Objects:
    rng = np.random.default_rng(seed)
    masks = np.zeros((int(rng.integers(0, 5)), height, width), bool)
    for mask in masks:
        top, left = rng.integers(0, height), rng.integers(0, width)
        mask[top : top + rng.integers(1, 12), left : left + rng.integers(1, 12)] = True
        mask[rng.random(mask.shape) > 0.8] = False
    return objects_of_masks(masks, rng.integers(0, 9, len(masks)), image_id=seed)


@given(st.integers(0, 10_000))
def test_boxes_of_masks_are_the_smallest(seed: int) -> None:
    objects = _random_objects(seed)

    for box, mask, area in zip(objects.boxes, objects.masks, objects.areas, strict=True):
        assert box.tolist() == _slow_box(mask)
        assert area == mask.sum()
    assert mask_boxes(np.zeros((0, 4, 4), bool)).shape == (0, 4)


@given(
    st.integers(0, 10_000),
    st.tuples(st.integers(-9, 20), st.integers(-9, 20), st.integers(1, 30), st.integers(1, 30)),
)
def test_a_crop_cuts_masks_as_a_loop_over_pixels_does(
    seed: int, where: tuple[int, int, int, int]
) -> None:
    objects = _random_objects(seed)
    left, top, width, height = where

    cut = crop_objects(objects, (left, top, left + width, top + height), min_side=1)

    expected = np.zeros((len(objects), height, width), bool)
    for row in range(height):
        for column in range(width):
            if 0 <= row + top < 23 and 0 <= column + left < 31:
                expected[:, row, column] = objects.masks[:, row + top, column + left]
    left_over = expected.any((1, 2))
    np.testing.assert_array_equal(cut.masks, expected[left_over])
    np.testing.assert_array_equal(cut.classes, objects.classes[left_over])
    for box, mask, area in zip(cut.boxes, cut.masks, cut.areas, strict=True):
        assert box.tolist() == _slow_box(mask)
        assert area == mask.sum()
    assert cut.image_id == seed


@given(st.integers(0, 10_000))
def test_flipping_twice_is_nothing_and_once_mirrors_boxes_with_masks(seed: int) -> None:
    objects = _random_objects(seed)

    once = flip_objects(objects, 31)

    np.testing.assert_array_equal(once.boxes, mask_boxes(once.masks))
    np.testing.assert_array_equal(flip_objects(once, 31).boxes, objects.boxes)
    np.testing.assert_array_equal(flip_objects(once, 31).masks, objects.masks)


@given(st.integers(0, 10_000), st.tuples(st.integers(3, 70), st.integers(3, 70)))
def test_masks_are_resized_as_pil_does_and_boxes_stay_around_them(
    seed: int, new: tuple[int, int]
) -> None:
    objects = _random_objects(seed)

    resized = resize_objects(objects, (23, 31), new)

    for number, mask in enumerate(objects.masks):
        by_pil = Image.fromarray(mask).resize((new[1], new[0]), Image.Resampling.NEAREST)
        np.testing.assert_array_equal(resized.masks[number], np.asarray(by_pil))
        if resized.masks[number].any():
            off = np.abs(resized.boxes[number] - _slow_box(resized.masks[number]))
            # Sampling may miss what lies within one old pixel or round by one new one.
            assert off.max() <= max(1.0, new[0] / 23 * 1.0, new[1] / 31 * 1.0, 12)


def test_a_doubled_image_doubles_boxes_and_quadruples_areas() -> None:
    objects = _random_objects(3)

    doubled = resize_objects(objects, (23, 31), (46, 62))

    np.testing.assert_array_equal(doubled.boxes, objects.boxes * 2)
    np.testing.assert_array_equal(doubled.areas, objects.areas * 4)
    np.testing.assert_array_equal(doubled.boxes, mask_boxes(doubled.masks))


def test_without_masks_boxes_are_clipped_and_areas_shrink_alike() -> None:
    objects = Objects(
        np.array([[0, 0, 10, 10], [8, 8, 12, 12], [20, 0, 30, 5]]),
        np.array([1, 2, 3]),
        areas=np.array([60, 16, 50], np.float32),
    )

    cut = crop_objects(objects, (5, 5, 15, 15))

    np.testing.assert_array_equal(cut.boxes, [[0, 0, 5, 5], [3, 3, 7, 7]])
    np.testing.assert_array_equal(cut.classes, [1, 2])
    np.testing.assert_allclose(cut.areas, [60 * 25 / 100, 16])


@pytest.mark.parametrize(
    ("limits", "left"), [({}, 2), ({"min_side": 3}, 1), ({"min_visible": 0.5}, 1)]
)
def test_what_is_too_small_or_mostly_cut_away_is_dropped(limits: dict, left: int) -> None:
    objects = Objects(np.array([[0, 0, 12, 12], [20, 20, 24, 24]]), np.array([0, 1]))

    cut = crop_objects(objects, (10, 10, 30, 30), **limits)

    assert len(cut) == left


def test_a_box_far_below_a_pixel_keeps_its_place_beside_an_empty_mask() -> None:
    masks = np.zeros((1, 64, 64), bool)
    masks[0, 1, 1] = True
    objects = objects_of_masks(masks, np.array([0]))

    small = resize_objects(objects, (64, 64), (4, 4))

    assert len(small) == 1
    assert not small.masks.any()
    np.testing.assert_allclose(small.boxes, objects.boxes / 16)


def test_no_objects_at_all_are_objects() -> None:
    nothing = Objects(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 5, 6), bool))

    for moved in (
        flip_objects(nothing, 6),
        resize_objects(nothing, (5, 6), (9, 9)),
        crop_objects(nothing, (0, 0, 3, 3)),
        nothing.take(np.zeros(0, bool)),
    ):
        assert len(moved) == 0
        assert moved.boxes.shape == (0, 4)
        assert moved.masks.shape[0] == 0


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"boxes": [[3, 0, 3, 5]]}, "right > left"),
        ({"boxes": [[0, 0, np.nan, 5]]}, "right > left"),
        ({"boxes": [[0, 0, 1, 1], [0, 0, 2, 2]]}, "1 objects by their classes"),
        ({"classes": [-1]}, "0 or more, got -1"),
        ({"masks": np.zeros((1, 4, 4), np.uint8)}, "expected bool"),
        ({"masks": np.zeros((2, 4, 4), bool)}, "'masks': 2"),
        ({"crowd": np.zeros(3, bool)}, "'crowd': 3"),
    ],
)
def test_objects_that_contradict_themselves_are_refused(given_: dict, message: str) -> None:
    with pytest.raises(SFAError, match=message):
        Objects(**({"boxes": [[0, 0, 2, 2]], "classes": [0]} | given_))
