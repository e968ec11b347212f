# SPDX-License-Identifier: Apache-2.0
"""Where pixels go: sizes, windows and the nearest neighbour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sfa_peft.errors import SFAError

LONGEST = 4


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return height and width of one number or two; raises SFAError if one is not positive."""
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise SFAError(f"size must be positive, got {size}")
    return height, width


def covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of an image that keeps its shape and just covers ``size``.

    Of a square size the shorter side is that long. No side becomes longer than four times the
    longer one of ``size``: so mmseg's scale of (2560, 640), which bounds memory.
    """
    factor = max(size[0] / height, size[1] / width)
    factor = min(factor, LONGEST * max(size) / max(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def nearest(old: int, new: int) -> NDArray[np.int64]:
    """Return the index in ``[0, old)`` whose centre is nearest to each of ``new`` positions."""
    return np.minimum(((np.arange(new) + 0.5) * (old / new)).astype(np.int64), old - 1)


def random_offset(
    scaled: int, crop: int, rng: np.random.Generator, around: int | None = None
) -> int:
    """Return where a crop begins along one side of ``scaled`` pixels, ``around`` one of them."""
    # Negative where the image is smaller than the crop: it then lies somewhere inside the crop.
    low, high = sorted((0, scaled - crop))
    if around is not None:
        low, high = max(low, around - crop + 1), min(high, around)
    return int(rng.integers(low, high + 1))


def random_window(
    labelled: NDArray[np.bool_], size: tuple[int, int], rng: np.random.Generator
) -> tuple[int, int]:
    """Return where a crop begins that holds a labelled pixel, if there is one.

    Args:
        labelled: Bool ``(H, W)``.
        size: Height and width of the crop.
        rng: Source of all randomness.

    Returns:
        Left and top, negative where the image is smaller than the crop.
    """
    (height, width), (crop_height, crop_width) = labelled.shape, size
    left = random_offset(width, crop_width, rng)
    top = random_offset(height, crop_height, rng)
    seen = labelled[max(top, 0) : top + crop_height, max(left, 0) : left + crop_width]
    if not seen.any() and labelled.any():
        row, column = rng.choice(np.argwhere(labelled))
        left = random_offset(width, crop_width, rng, int(column))
        top = random_offset(height, crop_height, rng, int(row))
    return left, top
