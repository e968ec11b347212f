# SPDX-License-Identifier: Apache-2.0
"""Sheets of depth: one scale for all, grey where there is no depth, and errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense.pictures.depth import (
    COLOURS,
    INVALID_COLOUR,
    colour_depth,
    depth_sheet,
    valid_depth,
)
from sfa_peft.errors import SFAError

pytest.importorskip("matplotlib")

GREY = tuple(round(255 * c) for c in INVALID_COLOUR)
RGB = np.zeros((8, 8, 3), np.uint8)


def scale_and_colours(near: float = 0.0, far: float = 1.0):
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    return Normalize(near, far, clip=True), colormaps[COLOURS]


def colours_in(path: Path) -> set[tuple[int, ...]]:
    with Image.open(path) as image:
        return {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}


def flat(depth: float) -> np.ndarray:
    return np.full((8, 8), depth, np.float32)


def test_pixels_without_a_depth_are_grey_and_no_others() -> None:
    depth = np.array([[0.0, -1.0, np.nan], [np.inf, 0.5, 0.9]])

    coloured = colour_depth(depth, *scale_and_colours())

    grey = (coloured == GREY).all(-1)
    np.testing.assert_array_equal(grey, [[True, True, True], [True, False, False]])
    np.testing.assert_array_equal(valid_depth(depth), ~grey)


def test_the_scale_holds_no_grey_and_its_ends_hold_all_beyond() -> None:
    ramp = np.linspace(0.001, 3, 500)[None]
    coloured = colour_depth(ramp, *scale_and_colours(0.5, 2.0))

    assert not (coloured == GREY).all(-1).any()
    beyond = ramp > 2
    assert len(np.unique(coloured[beyond], axis=0)) == 1
    assert len(np.unique(coloured[~beyond], axis=0)) > 200


def test_truth_and_prediction_share_one_scale(tmp_path: Path) -> None:
    # The prediction of one scene has the depth of the other's truth.
    rows = [[RGB, flat(2.0), flat(4.0)], [RGB, flat(4.0), flat(3.0)]]
    path = depth_sheet(rows, ("input", "truth", "SFA"), tmp_path / "new" / "a.png")

    near, far = 2.0, 4.0  # the percentiles of the two truths, an equal number of pixels each
    seen = colours_in(path)
    for depth in (2.0, 3.0, 4.0):
        expected = colour_depth(flat(depth), *scale_and_colours(near, far))[0, 0]
        assert tuple(expected.tolist()) in seen
    assert GREY not in seen
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_stated_range_and_missing_depth_are_drawn(tmp_path: Path) -> None:
    holes = flat(5.0)
    holes[:4] = 0
    path = depth_sheet(
        [[RGB, holes, flat(20.0)]], ("input", "truth", "SFA"), tmp_path / "a.png",
        depth_range=(1.0, 10.0),
    )  # fmt: skip

    seen = colours_in(path)
    assert GREY in seen
    for depth in (5.0, 10.0):
        expected = colour_depth(flat(depth), *scale_and_colours(1.0, 10.0))[0, 0]
        assert tuple(expected.tolist()) in seen


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "each row needs 2 pictures"),
        ([[RGB]], {}, "each row needs 2 pictures"),
        ([[RGB, flat(0.0)]], {}, "no depth to draw"),
        ([[RGB, RGB]], {}, "no depth to draw"),
        ([[RGB, np.ones((8, 8), np.int64)]], {}, "floating point .H, W., got int64"),
        ([[RGB, np.ones((1, 8, 8))]], {}, "floating point .H, W., got float64 .1, 8, 8."),
        ([[RGB, flat(1.0)]], {"depth_range": (2.0, 2.0)}, "expected near < far"),
    ],
)
def test_what_cannot_be_drawn_is_refused(rows, options, message: str, tmp_path: Path) -> None:
    with pytest.raises(SFAError, match=message):
        depth_sheet(rows, ("input", "truth"), tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())


def test_a_plane_at_one_distance_still_has_a_scale(tmp_path: Path) -> None:
    assert depth_sheet([[flat(3.0)]], ("truth",), tmp_path / "a.png").stat().st_size > 0
