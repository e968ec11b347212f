# SPDX-License-Identifier: Apache-2.0
"""COCO's three ways of writing a mask: polygons, run lengths, and run lengths as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.errors import SFAError

Mask = NDArray[np.bool_]


def decode_mask(written: Any, height: int, width: int) -> Mask:
    """Return the mask that a COCO ``segmentation`` entry stands for.

    Args:
        written: List of polygons ``[x0, y0, x1, y1, ...]``, or ``{"size": [h, w], "counts": ...}``
            with run lengths as a list or as COCO's text.
        height: Of the image, pixels.
        width: Of the image, pixels.

    Returns:
        Bool ``(height, width)``.

    Raises:
        SFAError: If it is none of these or of another size.
    """
    if isinstance(written, Mapping):
        if list(written.get("size", ())) != [height, width] or "counts" not in written:
            raise SFAError(
                f"run lengths: expected counts and the size [{height}, {width}] of the image, got "
                f"the keys {sorted(written)} and size {written.get('size')}"
            )
        counts = written["counts"]
        counts = decode_counts(counts) if isinstance(counts, (str, bytes)) else counts
        return mask_of_counts(counts, height, width)
    if not isinstance(written, Sequence) or isinstance(written, (str, bytes)) or not written:
        raise SFAError(f"expected polygons or run lengths, got {str(written)[:60]!r}")
    mask = np.zeros((height, width), bool)
    for polygon in written:
        mask |= polygon_mask(polygon, height, width)
    return mask


def polygon_mask(polygon: Sequence[float], height: int, width: int) -> Mask:
    """Return the pixels whose centre is inside a polygon, by the even-odd rule.

    pycocotools also counts pixels that the outline touches on some sides, so its masks differ along
    the outline by up to a pixel.

    Args:
        polygon: ``x0, y0, x1, y1, ...`` in pixels, three corners or more; closed of itself.
        height: Of the mask.
        width: Of the mask.

    Returns:
        Bool ``(height, width)``.

    Raises:
        SFAError: If there are too few or an odd number of coordinates, or one is not finite.
    """
    corners = np.asarray(polygon, np.float64)
    if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
        raise SFAError(
            f"polygon: expected x, y of 3 corners or more, got {corners.size} numbers"
            + ("" if np.isfinite(corners).all() else ", not all finite")
        )
    x0, y0 = corners[::2], corners[1::2]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    centres = (np.arange(height) + 0.5)[:, None]
    rows, edges = np.nonzero((y0 <= centres) != (y1 <= centres))
    slope = (x1[edges] - x0[edges]) / (y1[edges] - y0[edges])
    crossing = x0[edges] + (rows + 0.5 - y0[edges]) * slope
    # A row changes sides at the first pixel whose centre lies right of the crossing.
    first = np.clip(np.ceil(crossing - 0.5), 0, width).astype(np.int64)
    changes = np.zeros((height, width + 1), np.int64)
    np.add.at(changes, (rows, first), 1)
    return np.cumsum(changes[:, :width], 1) % 2 == 1


def mask_of_counts(counts: Sequence[int], height: int, width: int) -> Mask:
    """Return the mask of run lengths: outside, inside, outside, ... down the columns.

    Args:
        counts: Lengths of the runs, 0 or more, together ``height * width``.
        height: Of the mask.
        width: Of the mask.

    Returns:
        Bool ``(height, width)``.

    Raises:
        SFAError: If a length is negative or their sum another.
    """
    lengths = np.asarray(counts, np.int64)
    if lengths.ndim != 1 or (lengths < 0).any() or lengths.sum() != height * width:
        raise SFAError(
            f"run lengths: expected numbers of 0 or more with the sum {height * width} of a "
            f"{width}x{height} image, got the sum {lengths.sum()}"
        )
    inside = np.arange(lengths.size) % 2 == 1
    return np.repeat(inside, lengths).reshape(width, height).T


def decode_counts(text: str | bytes) -> list[int]:
    """Return the run lengths of COCO's text.

    Each number is written in groups of 5 bits, least first, plus 48; bit 5 says that another group
    follows, and bit 4 of the last one is the sign. From the fourth number on it is the difference
    to the number two before.

    Args:
        text: As pycocotools writes it.

    Returns:
        The run lengths.

    Raises:
        SFAError: If a character is out of range or the text ends within a number.
    """
    codes = text.encode("ascii", "replace") if isinstance(text, str) else text
    counts: list[int] = []
    value, shift = 0, 0
    for code in codes:
        group = code - 48
        if not 0 <= group < 64:
            raise SFAError(f"run lengths as text: character {chr(code)!r} is none of COCO's")
        value |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise SFAError("run lengths as text end within a number; a cut file?")
    return counts
