# SPDX-License-Identifier: Apache-2.0
"""Joint augmentation of an image and its metric depth, whatever moves pixels moving both alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfa_peft.dense.data.depth import (
    Crop,
    DepthMap,
    as_depth,
    depth_to_tensors,
    gamma_brightness_colour,
    matched_depth,
    vertical_cut_depth,
)
from sfa_peft.dense.data.geometry import as_size, covering, nearest, random_window
from sfa_peft.dense.data.transforms import FILL, ImageLike, normalise
from sfa_peft.errors import SFAError


class DepthTrainTransform:
    """Random scale, crop, flip, colours and vertical CutDepth, then normalisation.

    What the image leaves free of the crop is filled with the mean colour and depth 0. A crop
    without measured depth is drawn again around a pixel that has some.

    Args:
        size: Side of the square crop, or its height and width, in pixels.
        max_depth: Depth beyond it is not learned, metres: 10 for NYUv2, 80 for KITTI.
        scale: Range of the random scale, two positive numbers.
        fit: Scale 1 is the size at which the crop just fits into the image. False: scale 1 is the
            image's own size, for evaluation at that size; with scale (1, 1) plain crops, as BTS.
        divide_depth: Enlarged by ``f``, a picture is what the camera sees of a world ``f`` times as
            near, so metric depth stays true only if it is divided by the scale drawn. False leaves
            it.
        flip: Probability of a horizontal flip, in ``[0, 1]``.
        jitter: Strength of :func:`~sfa_peft.dense.data.depth.gamma_brightness_colour`, in
            ``[0, 1)``; 0 for none.
        cut_depth: Probability of :func:`~sfa_peft.dense.data.depth.vertical_cut_depth`, in
            ``[0, 1]``.
        crop: Applied first, e.g. :func:`~sfa_peft.dense.data.depth.nyu_border_crop`; by default
            none.
        keep_unlabelled: Let an image through in which no depth was measured, instead of an error.

    Raises:
        SFAError: If a number is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        max_depth: float,
        scale: tuple[float, float] = (1.0, 1.5),
        fit: bool = True,
        divide_depth: bool = True,
        flip: float = 0.5,
        jitter: float = 0.1,
        cut_depth: float = 0.25,
        crop: Callable[[int, int], Crop] | None = None,
        keep_unlabelled: bool = False,
    ) -> None:
        self.size = as_size(size)
        if not 0 < scale[0] <= scale[1]:
            raise SFAError(f"scale must be two positive numbers in order, got {scale}")
        if not (max_depth > 0 and 0 <= flip <= 1 and 0 <= jitter < 1 and 0 <= cut_depth <= 1):
            raise SFAError(
                "expected max_depth > 0, flip and cut_depth in [0, 1], jitter in [0, 1), got "
                f"{max_depth}, {flip}, {cut_depth}, {jitter}"
            )
        self.max_depth, self.scale = max_depth, scale
        self.fit, self.divide_depth = fit, divide_depth
        self.flip, self.jitter, self.cut_depth = flip, jitter, cut_depth
        self.crop, self.keep_unlabelled = crop, keep_unlabelled

    def __call__(
        self, image: ImageLike, depth: NDArray[Any], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Augment one pair.

        Args:
            image: See :func:`~sfa_peft.dense.data.transforms.as_image`.
            depth: See :func:`as_depth`, as large as the image.
            rng: Source of all randomness.

        Returns:
            As :func:`depth_to_tensors`, of the crop's size.

        Raises:
            SFAError: If the sizes differ, one of the two cannot be used, or no depth at all was
                measured up to ``max_depth``.
        """
        picture, metres = _cropped(image, as_depth(depth), self.crop)
        cut, cut_metres = self._scale_and_crop(picture, metres, rng)
        if rng.random() < self.flip:
            cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            cut_metres = cut_metres[:, ::-1]
        if rng.random() < self.cut_depth:
            cut = vertical_cut_depth(cut, cut_metres, rng, max_depth=self.max_depth)
        if self.jitter:
            cut = gamma_brightness_colour(cut, self.jitter, rng)
        return depth_to_tensors(cut, cut_metres)

    def _scale_and_crop(
        self, picture: Image.Image, metres: DepthMap, rng: np.random.Generator
    ) -> tuple[Image.Image, DepthMap]:
        height, width = self.size
        drawn = rng.uniform(*self.scale)
        fits = max(height / picture.height, width / picture.width)
        factor = drawn * fits if self.fit else drawn
        new = (max(1, round(picture.height * factor)), max(1, round(picture.width * factor)))
        if self.divide_depth:
            metres = (metres / drawn).astype(np.float32)
        metres = as_depth(_resize(metres, new), max_depth=self.max_depth)
        if not (metres.any() or self.keep_unlabelled):
            raise SFAError(
                f"no depth up to {self.max_depth} m in the whole image; a batch of such has no "
                "loss. Leave the image out, or pass keep_unlabelled=True"
            )
        left, top = random_window(metres > 0, self.size, rng)
        canvas = Image.new("RGB", (width, height), FILL)
        canvas.paste(picture.resize((new[1], new[0]), Image.Resampling.BILINEAR), (-left, -top))
        placed = np.zeros(self.size, np.float32)
        seen = metres[max(top, 0) : top + height, max(left, 0) : left + width]
        row, column = max(-top, 0), max(-left, 0)
        placed[row : row + seen.shape[0], column : column + seen.shape[1]] = seen
        return canvas, placed


class DepthEvalTransform:
    """Crop, resize the image for the model, leave the depth as it is, and normalise.

    So errors are counted on the pixels of the data; :func:`~sfa_peft.dense.depth_at_labels` brings
    predictions to them. Images of several sizes make batches of one.

    Args:
        size: Height and width that the cropped image just covers, its shape kept; one number for
            the shorter side. By default its own size, which is scale 1 of training without ``fit``.
            No side becomes longer than four times the longer one of ``size``.
        label_size: Height and width that the depth is resized to, one number for a square: errors
            at another size than the data's own.
        max_depth: Depth beyond it becomes 0, in metres; by default none.
        crop: Applied first, e.g. :func:`~sfa_peft.dense.data.depth.kitti_benchmark_crop`; by
            default none.

    Raises:
        SFAError: If a size is not positive.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        *,
        label_size: int | tuple[int, int] | None = None,
        max_depth: float | None = None,
        crop: Callable[[int, int], Crop] | None = None,
    ) -> None:
        self.size = None if size is None else as_size(size)
        self.label_size = None if label_size is None else as_size(label_size)
        self.max_depth, self.crop = max_depth, crop

    def __call__(
        self, image: ImageLike, depth: NDArray[Any], rng: np.random.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Resize the image, and the depth where that is asked for, by nearest neighbour.

        Args:
            image: See :func:`~sfa_peft.dense.data.transforms.as_image`.
            depth: See :func:`as_depth`, as large as the image.
            rng: Not used; there so that both transforms are called alike.

        Returns:
            ``pixel_values``, float32 ``(3, h, w)``, and ``labels``, float32 ``(H, W)`` in metres.

        Raises:
            SFAError: If the sizes differ or one of the two cannot be used.
        """
        picture, metres = _cropped(image, as_depth(depth, max_depth=self.max_depth), self.crop)
        if self.size is not None:
            height, width = covering(picture.height, picture.width, self.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.label_size is not None:
            metres = _resize(metres, self.label_size)
        labels = torch.from_numpy(np.ascontiguousarray(metres))
        return {"pixel_values": normalise(picture), "labels": labels}


def _resize(metres: DepthMap, new: tuple[int, int]) -> DepthMap:
    rows, columns = nearest(metres.shape[0], new[0]), nearest(metres.shape[1], new[1])
    return metres[rows[:, None], columns[None]]


def _cropped(
    image: ImageLike, depth: DepthMap, crop: Callable[[int, int], Crop] | None
) -> tuple[Image.Image, DepthMap]:
    picture, metres = matched_depth(image, depth)
    if crop is None:
        return picture, metres
    left, top, right, bottom = crop(picture.height, picture.width)
    return picture.crop((left, top, right, bottom)), metres[top:bottom, left:right]
