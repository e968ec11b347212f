# SPDX-License-Identifier: Apache-2.0
"""Metric depth beside an image: checks, tensors, crops and changes of colour.

Depth is in metres and 0 means "not measured". Depth is only ever resampled by the nearest
neighbour, so no value between a surface and a hole, or between two surfaces, is invented.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfa_peft.dense.data.transforms import ImageLike, as_image, normalise
from sfa_peft.errors import SFAError

DepthMap = NDArray[np.float32]
Crop = tuple[int, int, int, int]  # left, top, right, bottom


def as_depth(depth: NDArray[Any], *, max_depth: float | None = None) -> DepthMap:
    """Return metric depth as float32, with 0 wherever it cannot be used.

    Args:
        depth: Metres, floating point ``(H, W)``; 0 where not measured.
        max_depth: What is farther becomes 0, in metres; by default nothing.

    Returns:
        The depth; infinite and NaN values have become 0.

    Raises:
        SFAError: If the array is not floating point (raw 16-bit values are no metres), not of two
            dimensions, or negative somewhere.
    """
    if depth.ndim != 2 or depth.dtype.kind != "f":
        raise SFAError(
            f"depth: expected floating-point metres (H, W), got {depth.dtype} {depth.shape}; "
            "divide stored integers by their scale first (1000 for NYUv2, 256 for KITTI)"
        )
    metres = np.where(np.isfinite(depth), depth, 0).astype(np.float32)
    if metres.size and metres.min() < 0:
        raise SFAError(f"depth: expected 0 (not measured) or more metres, got {metres.min()}")
    return metres if max_depth is None else np.where(metres > max_depth, np.float32(0), metres)


def depth_to_tensors(image: ImageLike, depth: NDArray[Any]) -> dict[str, torch.Tensor]:
    """Normalise an image by ImageNet's mean and deviation and return it with its depth.

    Args:
        image: See :func:`~sfa_peft.dense.data.transforms.as_image`.
        depth: See :func:`as_depth`, as large as the image.

    Returns:
        ``pixel_values``, float32 ``(3, H, W)``, and ``labels``, float32 ``(H, W)``, metres, 0 where
        not measured.

    Raises:
        SFAError: If the sizes differ or one of the two cannot be used.
    """
    picture, metres = matched_depth(image, depth)
    labels = torch.from_numpy(np.ascontiguousarray(metres))
    return {"pixel_values": normalise(picture), "labels": labels}


def gamma_brightness_colour(
    image: Image.Image, strength: float, rng: np.random.Generator
) -> Image.Image:
    """Change gamma, brightness and the three colours by random factors, as BTS does.

    Args:
        image: RGB image.
        strength: Each of the five factors is drawn from ``[1 - strength, 1 + strength]``; in
            ``[0, 1)``. BTS has 0.1, and 0.25 for the brightness of NYUv2.
        rng: Source of the factors.

    Returns:
        The changed RGB image.
    """
    factors = rng.uniform(1 - strength, 1 + strength, 5).astype(np.float32)
    pixels = (np.asarray(image, np.float32) / np.float32(255)) ** factors[0]
    pixels = pixels * (factors[1] * factors[2:])
    return Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))


def vertical_cut_depth(
    image: Image.Image,
    depth: DepthMap,
    rng: np.random.Generator,
    *,
    max_depth: float,
    share: float = 0.75,
) -> Image.Image:
    """Replace a vertical strip of the image by its depth, as grey (Vertical CutDepth of GLPDepth).

    Kim et al., 2022, arXiv 2201.07436, Eqs. (1) to (3): of an image of width W, the strip begins at
    ``l = a * W`` and is ``max((W - a * W) * b * p, 1)`` wide, with a and b uniform in ``[0, 1)``.

    Args:
        image: RGB image.
        depth: Metres, float32, as large as the image.
        rng: Source of a and b.
        max_depth: Metres that become white; 0 becomes black.
        share: The paper's p, in ``(0, 1]``.

    Returns:
        The changed RGB image.
    """
    a, b = rng.random(2)
    left = int(a * image.width)
    right = left + max(int((image.width - a * image.width) * b * share), 1)
    pixels = np.array(image)
    strip = np.clip(depth[:, left:right] / np.float32(max_depth), 0, 1) * 255
    pixels[:, left:right] = strip[..., None].astype(np.uint8)
    return Image.fromarray(pixels)


def nyu_border_crop(height: int, width: int) -> Crop:
    """Return NYUv2's 640x480 without the white frame, 43 to 608 by 45 to 472, as BTS trains."""
    if (height, width) != (480, 640):
        raise SFAError(f"the NYUv2 crop is for 640x480 images, got {width}x{height}")
    return (43, 45, 608, 472)


def kitti_benchmark_crop(height: int, width: int) -> Crop:
    """Return KITTI's benchmark crop: 1216x352, at the bottom and in the middle."""
    if height < 352 or width < 1216:
        raise SFAError(f"the KITTI crop is 1216x352, the image only {width}x{height}")
    left = (width - 1216) // 2
    return (left, height - 352, left + 1216, height)


def matched_depth(image: ImageLike, depth: NDArray[Any]) -> tuple[Image.Image, DepthMap]:
    """Return an image and its depth, checked; raises SFAError if their sizes differ."""
    picture, metres = as_image(image), as_depth(depth)
    if metres.shape != (picture.height, picture.width):
        raise SFAError(
            f"image and depth must have one size, got {picture.width}x{picture.height} "
            f"and {metres.shape[1]}x{metres.shape[0]} (width x height)"
        )
    return picture, metres
