# SPDX-License-Identifier: Apache-2.0
"""Test-time augmentation: several scales and mirror images for classes, flips and shifts for depth.

Not for networks whose layers change with the size of the image: ``Swin`` (not ``Swinv2``) of
transformers shrinks its windows for good once an image is smaller than a window.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sfa_peft.dense.inference import Model, Size, image_size, predict_maps, resize, whole_image_maps
from sfa_peft.errors import SFAError

#: The scales of multi-scale results on ADE20K.
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def multi_scale_probabilities(
    model: Model,
    pixel_values: torch.Tensor,
    *,
    size: Size | None = None,
    scales: Sequence[float] = SCALES,
    flip: bool = True,
    crop_size: int | Size | None = None,
    stride: int | Size | None = None,
    size_divisor: int = 1,
) -> torch.Tensor:
    r"""Average class probabilities over scales and mirror images, as mmseg does.

    Each image is resized by each scale and run as it is and mirrored; the maps are resized to
    ``size``, and only then turned into probabilities and averaged:

    .. math:: p = \frac{1}{2S} \sum_s \sum_{f \in \{id, flip\}}
        \mathrm{softmax}(\mathrm{resize}(f(\mathrm{model}(f(x_s)))))

    Args:
        model: As in :func:`~sfa_peft.dense.inference.whole_image_maps`.
        pixel_values: Normalised images ``(B, 3, H, W)``.
        size: Height and width of the labels; None for those of the images.
        scales: Factors of height and width; sides are rounded half up.
        flip: Whether to add the mirror image of each.
        crop_size: Runs windows of this size at each scale, as in
            :func:`~sfa_peft.dense.inference.sliding_window_maps`; None for whole images.
        stride: Distance between the windows.
        size_divisor: Padding to multiples of this, as in
            :func:`~sfa_peft.dense.inference.whole_image_maps`.

    Returns:
        Probabilities, float32 ``(B, C, *size)``; ``argmax(1)`` are the classes. With Mask2Former
        the mean of its scores, whose sum over the classes may differ from 1.

    Raises:
        SFAError: If there is no scale, a scale leaves no pixel, or the model predicts depth, and
            as :func:`~sfa_peft.dense.inference.predict_maps`.
    """
    height, width = image_size(pixel_values)
    size = size or (height, width)
    total: torch.Tensor | None = None
    for scale in scales:
        scaled = (int(height * scale + 0.5), int(width * scale + 0.5))
        if min(scaled) < 1:
            raise SFAError(f"scale {scale} makes {height}x{width} images {scaled[0]}x{scaled[1]}")
        image = resize(pixel_values, scaled).to(pixel_values.dtype)
        for mirrored in (False, True) if flip else (False,):
            maps = predict_maps(
                model,
                image.flip(-1) if mirrored else image,
                crop_size=crop_size,
                stride=stride,
                size_divisor=size_divisor,
            )
            maps = (maps.flipped() if mirrored else maps).resized(size)
            total = maps.probabilities() + (0 if total is None else total)
    if total is None:
        raise SFAError("scales is empty; use (1.0,) for the image as it is")
    return total / (len(scales) * (1 + flip))


def predict_depth(
    model: Model,
    pixel_values: torch.Tensor,
    *,
    flip: bool = True,
    num_shifts: int | None = None,
    size_divisor: int = 1,
) -> torch.Tensor:
    """Average depth over the mirror image and over shifted square windows, as MIM-Depth does.

    Windows as high as the image begin every ``(W - H) // (num_shifts - 1)`` pixels. Where that
    leaves columns at the right uncovered, which MIM-Depth fills with the least depth, one more
    window fills those columns and no others.

    Args:
        model: As in :func:`~sfa_peft.dense.inference.whole_image_maps`, with ``predicted_depth``.
        pixel_values: Normalised images ``(B, 3, H, W)``.
        flip: Whether to average with the mirror image.
        num_shifts: Number of windows, 2 or more; None for whole images. MIM-Depth takes 2 on
            NYUv2 and 16 on KITTI.
        size_divisor: As in :func:`~sfa_peft.dense.inference.whole_image_maps`.

    Returns:
        Depths, float32 ``(B, H, W)`` in the model's unit.

    Raises:
        SFAError: If the model does not predict depth, windows are asked for of an image higher
            than wide, or they are so many that they coincide or so few that they leave gaps, and
            as :func:`~sfa_peft.dense.inference.whole_image_maps`.
    """
    if num_shifts is None:
        return _flip_averaged(model, pixel_values, flip, size_divisor)
    height, width = image_size(pixel_values)
    interval = (width - height) // (num_shifts - 1) if num_shifts > 1 else 0
    if num_shifts < 2 or interval < 1:
        raise SFAError(
            f"num_shifts={num_shifts}: expected 2 or more, and an image wider than high by a pixel "
            f"per shift, got {height}x{width}"
        )
    covered = (num_shifts - 1) * interval + height
    if max(interval, width - covered) > height:
        raise SFAError(
            f"{num_shifts} windows of {height}x{height}, {interval} pixels apart, leave gaps in "
            f"{height}x{width} images; take another num_shifts, or sliding_window_maps"
        )
    total = pixel_values.new_zeros((len(pixel_values), height, width), dtype=torch.float32)
    count = torch.zeros_like(total)
    for left in range(0, num_shifts * interval, interval):
        place = (..., slice(left, left + height))
        total[place] += _flip_averaged(model, pixel_values[place], flip, size_divisor)
        count[place] += 1
    if covered < width:
        last = _flip_averaged(model, pixel_values[..., -height:], flip, size_divisor)
        total[..., covered:] = last[..., covered - width :]
        count[..., covered:] = 1
    return total / count


def _flip_averaged(
    model: Model, pixel_values: torch.Tensor, flip: bool, size_divisor: int
) -> torch.Tensor:
    maps = whole_image_maps(model, pixel_values, size_divisor=size_divisor)
    if maps.kind != "depth":
        raise SFAError(f"the model predicts {maps.kind}, not predicted_depth")
    depth = maps.values[:, 0]
    if flip:
        mirrored = whole_image_maps(model, pixel_values.flip(-1), size_divisor=size_divisor)
        depth = (depth + mirrored.flipped().values[:, 0]) / 2
    return depth
