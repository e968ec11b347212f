# SPDX-License-Identifier: Apache-2.0
"""COCO's masks: its own encodings and rasteriser written out slowly, and hostile input."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.dense.coco_masks import decode_mask, encode_masks
from sfa_peft.errors import SFAError

pytest.importorskip("faster_coco_eval")


def slow_counts(mask: np.ndarray) -> list[int]:
    """Run lengths by walking down the columns."""
    counts, inside = [0], False
    for value in mask.T.ravel():
        if bool(value) != inside:
            counts.append(0)
            inside = not inside
        counts[-1] += 1
    return counts


def slow_text(counts: list[int]) -> str:
    """COCO's text, number by number: 5 bits each, from the fourth on the change since two ago."""
    text = ""
    for position, count in enumerate(counts):
        number = count - (counts[position - 2] if position > 2 else 0)
        while True:
            group, number = number & 31, number >> 5
            more = number != (-1 if group & 16 else 0)
            text += chr(48 + group + (32 if more else 0))
            if not more:
                break
    return text


def slow_polygon(polygon: list[float], height: int, width: int) -> np.ndarray:
    """COCO's rasteriser: the outline in fifths of a pixel, its crossings of columns, a parity.

    A corner goes to the nearest fifth, an edge one fifth at a time along its longer side. Where
    the outline passes from one fifth of x to the next in the middle of a column of pixels, that
    column changes sides from the nearest row on.
    """
    corners = [int(5 * value + 0.5) for value in polygon]  # cut towards 0, as C does
    xs, ys = corners[::2], corners[1::2]
    outline: list[tuple[int, int]] = []
    for x0, y0, x1, y1 in zip(xs, ys, xs[1:] + xs[:1], ys[1:] + ys[:1], strict=True):
        outline += slow_edge(x0, y0, x1, y1)
    changes = np.zeros(height * width + 1, int)
    for (x0, y0), (x1, y1) in pairwise(outline):
        column = (min(x0, x1) + 0.5) / 5 - 0.5
        if x0 == x1 or column != int(column) or not 0 <= column < width:
            continue
        row = int(np.ceil(min(max((min(y0, y1) + 0.5) / 5 - 0.5, 0), height)))
        changes[int(column) * height + row] += 1
    return (np.cumsum(changes[:-1]) % 2 == 1).reshape(width, height).T


def slow_edge(x0: int, y0: int, x1: int, y1: int) -> list[tuple[int, int]]:
    """Points of an edge, both ends, one step of the longer side apart."""
    across, down = abs(x1 - x0), abs(y1 - y0)
    if across >= down:
        flip = x0 > x1
        start, end = ((x1, y1), (x0, y0)) if flip else ((x0, y0), (x1, y1))
        slope = (end[1] - start[1]) / across if across else 0.0
        points = [(start[0] + t, int(start[1] + slope * t + 0.5)) for t in range(across + 1)]
    else:
        flip = y0 > y1
        start, end = ((x1, y1), (x0, y0)) if flip else ((x0, y0), (x1, y1))
        slope = (end[0] - start[0]) / down
        points = [(int(start[0] + slope * t + 0.5), start[1] + t) for t in range(down + 1)]
    return points[::-1] if flip else points


def some_mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 80, 2)
    coarse = rng.random((height // 7 + 1, width // 5 + 1)) < rng.random()
    return np.kron(coarse, np.ones((7, 5), bool))[:height, :width].astype(bool)


@given(st.integers(0, 100_000))
def test_masks_are_encoded_as_coco_does_and_come_back(seed: int) -> None:
    mask = some_mask(seed)
    counts, size = slow_counts(mask), list(mask.shape)

    assert encode_masks(mask[None]) == [{"size": size, "counts": slow_text(counts).encode()}]
    for written in (counts, slow_text(counts), slow_text(counts).encode()):
        decoded = decode_mask({"size": size, "counts": written}, *mask.shape)
        np.testing.assert_array_equal(decoded, mask)


def test_several_masks_and_none_are_encoded() -> None:
    masks = np.zeros((2, 4, 3), bool)
    masks[1, 1:3, 0] = True

    assert encode_masks(masks[:0]) == []
    assert [one["counts"] for one in encode_masks(masks)] == [b"<", b"129"]


@given(
    st.lists(st.floats(-5, 25), min_size=6, max_size=16).filter(lambda v: len(v) % 2 == 0),
    st.integers(0, 3),
)
def test_polygons_are_filled_as_coco_fills_them_to_the_pixel(
    polygon: list[float], digits: int
) -> None:
    polygon = [round(value, digits) for value in polygon]

    mask = decode_mask([polygon], 13, 17)

    np.testing.assert_array_equal(mask, slow_polygon(polygon, 13, 17))


# Encodings that pycocotools 2.0.11 makes of these polygons.
KNOWN = [
    ([[2.5, 1.5, 6.0, 1.0, 6.25, 4.0, 2.0, 4.0]], 10, 8, b"f02710000c0"),
    ([[3.2, 2.1, 9.7, 3.3, 8.4, 9.9, 2.6, 8.8]], 12, 12, b"V17501O01O00O1Li0"),
    (
        [[10.37, 4.52, 15.81, 9.06, 13.2, 16.9, 6.75, 14.44, 4.1, 8.23]],
        20,
        24,
        b"h21b03N3L2O0O101O0100N2L4Lj4",
    ),
    (
        [
            [5.5, 5.5, 14.5, 5.5, 14.5, 14.5, 5.5, 14.5],
            [12.25, 10.0, 22.75, 12.5, 18.0, 21.0],
        ],
        24,
        26,
        b"f49?0000000000000005LO2N2OO0N2O1Nf2",
    ),
    ([[-3.4, 2.2, 7.7, -2.0, 30.1, 12.3, 9.9, 25.6]], 16, 20, b"1872O2N2Nb3O_L1O001O1O001O1O"),
]


@pytest.mark.parametrize(("polygons", "height", "width", "counts"), KNOWN)
def test_known_encodings_of_coco_come_out(
    polygons: list[list[float]], height: int, width: int, counts: bytes
) -> None:
    mask = decode_mask(polygons, height, width)

    assert encode_masks(mask[None])[0]["counts"] == counts


def test_several_polygons_are_one_mask() -> None:
    mask = decode_mask([[0, 0, 2, 0, 2, 2, 0, 2], [3, 3, 5, 3, 5, 5, 3, 5]], 6, 6)

    expected = np.zeros((6, 6), bool)
    expected[:2, :2] = expected[3:5, 3:5] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (None, "polygons or run lengths"),
        ([], "polygons or run lengths"),
        ("abc", "polygons or run lengths"),
        ([[0, 0, 1, 1]], "3 corners or more, got 4 numbers"),
        ([[0, 0, 1, 1, 2]], "got 5 numbers"),
        ([[0, 0, 1, 1, np.nan, 2]], "not all finite"),
        ([["a", 0, 1, 1, 3, 2]], "expected numbers"),
        ([[0, 0, 1e9, 1, 3, 2]], "far beyond the 6x6 image"),
        ({"counts": [36]}, "size None"),
        ({"size": [6, 6]}, "run lengths"),
        ({"size": [6, 7], "counts": [42]}, r"size \[6, 6\] of the image"),
        ({"size": [6, 6], "counts": [35]}, "sum 36 .* got the sum 35"),
        ({"size": [6, 6], "counts": [40, -4]}, "0 or more"),
        ({"size": [6, 6], "counts": [5.5, 30.5]}, "whole numbers"),
        ({"size": [6, 6], "counts": [2**62] * 4 + [36]}, "cannot be read"),
        ({"size": [6, 6], "counts": "Q"}, "a cut file"),
        ({"size": [6, 6], "counts": "0"}, "decoded 0 pixels"),
        ({"size": [6, 6], "counts": "o" * 1000}, "cannot be read"),
        ({"size": [6, 6], "counts": " !"}, "cannot be read"),
        ({"size": [6, 6], "counts": "é"}, "cannot be read"),
    ],
)
def test_what_is_no_mask_is_refused(written: Any, message: str) -> None:
    with pytest.raises(SFAError, match=message):
        decode_mask(written, 6, 6)


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)

    with pytest.raises(SFAError, match=r"pip install 'sfa-peft\[detection\]'"):
        decode_mask([[0, 0, 1, 1, 0, 1]], 6, 6)
