# SPDX-License-Identifier: Apache-2.0
"""COCO's masks: run lengths and their text both ways, polygons pixel by pixel, hostile input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.dense.data.rle import decode_counts, decode_mask, mask_of_counts, polygon_mask
from sfa_peft.errors import SFAError


def _slow_counts(mask: np.ndarray) -> list[int]:
    """Run lengths by walking down the columns."""
    counts, inside = [0], False
    for value in mask.T.ravel():
        if bool(value) != inside:
            counts.append(0)
            inside = not inside
        counts[-1] += 1
    return counts


def _slow_text(counts: list[int]) -> str:
    """COCO's text, number by number."""
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


def _mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 80, 2)
    coarse = rng.random((height // 7 + 1, width // 5 + 1)) < rng.random()
    return np.kron(coarse, np.ones((7, 5), bool))[:height, :width].astype(bool)


@given(st.integers(0, 100_000))
def test_run_lengths_and_their_text_give_the_mask_back(seed: int) -> None:
    mask = _mask(seed)
    counts = _slow_counts(mask)
    size = list(mask.shape)

    np.testing.assert_array_equal(mask_of_counts(counts, *mask.shape), mask)
    assert decode_counts(_slow_text(counts)) == counts
    for written in (counts, _slow_text(counts), _slow_text(counts).encode()):
        decoded = decode_mask({"size": size, "counts": written}, *mask.shape)
        np.testing.assert_array_equal(decoded, mask)


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=9))
def test_text_holds_numbers_of_any_size(counts: list[int]) -> None:
    assert decode_counts(_slow_text(counts)) == counts


@pytest.mark.parametrize("seed", range(20))
def test_text_is_read_as_the_coco_library_reads_it(seed: int) -> None:
    library = pytest.importorskip("faster_coco_eval.core.mask")
    mask = _mask(seed)

    theirs = library.encode(np.asfortranarray(mask.astype(np.uint8)))

    decoded = decode_mask({"size": list(mask.shape), "counts": theirs["counts"]}, *mask.shape)
    np.testing.assert_array_equal(decoded, mask)


def _inside(x: float, y: float, polygon: list[float]) -> bool:
    """Even-odd rule by a ray to the right."""
    corners = list(zip(polygon[::2], polygon[1::2], strict=True))
    odd = False
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
        if (y0 <= y) != (y1 <= y) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) > x:
            odd = not odd
    return odd


def _distance(x: float, y: float, polygon: list[float]) -> float:
    """Return the distance of a point from the nearest edge."""
    corners = [complex(*pair) for pair in zip(polygon[::2], polygon[1::2], strict=True)]
    point, found = complex(x, y), []
    for start, end in zip(corners, [*corners[1:], corners[0]], strict=True):
        edge = end - start
        along = (
            0.0 if abs(edge) < 1e-9 else ((point - start) * edge.conjugate()).real / abs(edge) ** 2
        )
        found.append(abs(point - start - min(max(along, 0.0), 1.0) * edge))
    return min(found)


@given(
    st.lists(st.floats(-5, 25), min_size=6, max_size=16).filter(lambda v: len(v) % 2 == 0),
)
def test_a_polygon_holds_the_pixels_whose_centre_is_inside(polygon: list[float]) -> None:
    mask = polygon_mask(polygon, 13, 17)

    for row in range(13):
        for column in range(17):
            x, y = column + 0.5, row + 0.5
            if _distance(x, y, polygon) > 1e-6:  # on the outline rounding decides
                assert mask[row, column] == _inside(x, y, polygon)


@pytest.mark.parametrize("seed", range(20))
def test_polygons_agree_with_the_coco_library_but_along_the_outline(seed: int) -> None:
    library = pytest.importorskip("faster_coco_eval.core.mask")
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radius = rng.uniform(20, 45, 9)
    points = np.stack((50 + radius * np.cos(angle), 50 + radius * np.sin(angle)), 1)
    polygon = points.ravel().tolist()

    ours = decode_mask([polygon], 100, 100)
    theirs = library.decode(library.merge(library.frPyObjects([polygon], 100, 100))).astype(bool)

    outline = np.hypot(*(points - np.roll(points, 1, 0)).T).sum()
    assert (ours ^ theirs).sum() < 1.1 * outline
    assert (ours & theirs).sum() / (ours | theirs).sum() > 0.9


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
        ({"counts": [36]}, "size None"),
        ({"size": [6, 6]}, "run lengths"),
        ({"size": [6, 7], "counts": [42]}, r"size \[6, 6\] of the image"),
        ({"size": [6, 6], "counts": [35]}, "sum 36 .* got the sum 35"),
        ({"size": [6, 6], "counts": [40, -4]}, "0 or more"),
        ({"size": [6, 6], "counts": "Q"}, "end within a number"),
        ({"size": [6, 6], "counts": " !"}, "none of COCO's"),
        ({"size": [6, 6], "counts": "é"}, "got the sum|none of COCO's"),
    ],
)
def test_what_is_no_mask_is_refused(written: object, message: str) -> None:
    with pytest.raises(SFAError, match=message):
        decode_mask(written, 6, 6)
