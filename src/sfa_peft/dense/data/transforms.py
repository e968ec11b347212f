# SPDX-License-Identifier: Apache-2.0
"""Joint augmentation of an image and its mask of class ids, in numpy and PIL.

Whatever moves pixels moves image and mask by the same amount, masks are only ever resampled by the
nearest neighbour, and all randomness comes from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sfa_peft.dense.data.geometry import as_size, covering, random_window
from sfa_peft.errors import SFAError

IGNORE_INDEX = 255  # What transformers' segmentation losses and mmseg leave out.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ImageLike = Image.Image | NDArray[Any]
Transform = Callable[[ImageLike, ImageLike, np.random.Generator], dict[str, torch.Tensor]]

Colour = tuple[float, float, float]

# What a hole left by a crop is filled with: the mean colour, 0 after normalisation.
FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)


def as_image(image: ImageLike) -> Image.Image:
    """Return an RGB image of any PIL image or uint8 array.

    Args:
        image: PIL image of any mode but floats (grey, palette, alpha, 16-bit grey), or uint8
            ``(H, W)`` or ``(H, W, 3)``.

    Returns:
        The image in mode RGB. Of 16-bit grey the high byte is kept; an alpha channel is dropped.

    Raises:
        SFAError: If an array is not uint8 or has another shape, or a picture is of floats or of
            integers beyond 16 bits: which of their values is white is not known.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.shape[2:] not in ((), (3,)) or image.ndim < 2:
            raise SFAError(
                f"image array: expected uint8 (H, W) or (H, W, 3), got {image.dtype} {image.shape}"
            )
        image = Image.fromarray(image)
    if image.mode.startswith(("I", "F")):
        image = _high_byte(image)
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    # PIL clips 16-bit values at 255 when it converts, so that nearly all become white. It decodes
    # them as I;16, and as I from PGM files and in its older versions.
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise SFAError("a picture of floats (mode F): expected 8 or 16 bits a channel")
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        raise SFAError(
            f"a picture of integers from {values.min()} to {values.max()} (mode {image.mode}): "
            "expected 8 or 16 bits a channel"
        )
    return Image.fromarray((values >> 8).astype(np.uint8))


def as_mask(mask: ImageLike) -> Image.Image:
    """Return a mask of class ids as a PIL image of mode L.

    Args:
        mask: PIL image of one channel (grey, palette, bilevel, 16 or 32-bit), where the stored
            number is the class id, or an integer array ``(H, W)``; ids in ``[0, 255]``.

    Returns:
        The mask; palette indices are kept as ids, their colours are not looked at.

    Raises:
        SFAError: If the mask has several channels, is not of integers, or holds an id outside
            ``[0, 255]``.
    """
    ids = np.asarray(mask)
    if ids.ndim != 2:
        what = f"mode {mask.mode}" if isinstance(mask, Image.Image) else f"shape {ids.shape}"
        raise SFAError(
            f"mask: expected one channel of class ids, got {what}; turn colours into ids first"
        )
    if ids.dtype.kind not in "biu":
        raise SFAError(f"mask: expected integer class ids, got {ids.dtype}")
    if ids.size and (ids.min() < 0 or ids.max() > 255):
        raise SFAError(f"mask: class ids must be in [0, 255], got {ids.min()} to {ids.max()}")
    return Image.fromarray(ids.astype(np.uint8))


def to_tensors(image: ImageLike, mask: ImageLike) -> dict[str, torch.Tensor]:
    """Normalise an image by ImageNet's mean and deviation and return both as tensors.

    Args:
        image: See :func:`as_image`.
        mask: See :func:`as_mask`.

    Returns:
        ``pixel_values``, float32 ``(3, H, W)``, -2.2 to 2.7, and ``labels``, int64 ``(H, W)``.

    Raises:
        SFAError: If the sizes differ or one of the two cannot be used.
    """
    picture, ids = _matched(image, mask)
    return {"pixel_values": normalise(picture), "labels": _as_labels(ids)}


def normalise(
    image: Image.Image, mean: Colour = IMAGENET_MEAN, std: Colour = IMAGENET_STD
) -> torch.Tensor:
    """Return an RGB image as float32 ``(3, H, W)``, less a mean, by a deviation, of [0, 1]."""
    pixels = np.asarray(image, np.float32) / np.float32(255)
    pixels = (pixels - np.array(mean, np.float32)) / np.array(std, np.float32)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def colour_jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by random factors.

    Args:
        image: RGB image.
        strength: Each factor is drawn from ``[1 - strength, 1 + strength]``; in ``[0, 1]``.
        rng: Source of the three factors.

    Returns:
        The changed RGB image.
    """
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    pixels = np.asarray(image, np.float32) * brightness
    grey = pixels @ np.array((0.299, 0.587, 0.114), np.float32)
    pixels = grey[..., None] + (pixels - grey[..., None]) * saturation
    pixels = grey.mean() + (pixels - grey.mean()) * contrast
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


class TrainTransform:
    """Random scale, crop, horizontal flip and colour jitter, then normalisation.

    At scale 1 the crop just fits into the resized image; below, the hole is filled with the mean
    colour and with ``IGNORE_INDEX``. A crop without a labelled pixel is drawn again around one.

    Args:
        size: Side of the square crop, or its height and width, in pixels.
        scale: Range of the random scale, two positive numbers.
        flip: Probability of a horizontal flip, in ``[0, 1]``.
        jitter: Strength of :func:`colour_jitter`, in ``[0, 1]``; 0 for none.
        ignore_index: Id in the masks that means "not labelled"; becomes ``IGNORE_INDEX``.
        keep_unlabelled: Let an image through in which no pixel is labelled, instead of an error.

    Raises:
        SFAError: If a number is out of its range.
    """

    def __init__(
        self,
        size: int | tuple[int, int],
        *,
        scale: tuple[float, float] = (0.75, 2.0),
        flip: float = 0.5,
        jitter: float = 0.3,
        ignore_index: int = IGNORE_INDEX,
        keep_unlabelled: bool = False,
    ) -> None:
        self.size = as_size(size)
        if not 0 < scale[0] <= scale[1]:
            raise SFAError(f"scale must be two positive numbers in order, got {scale}")
        if not (0 <= flip <= 1 and 0 <= jitter <= 1):
            raise SFAError(f"flip and jitter must be in [0, 1], got flip={flip}, jitter={jitter}")
        self.scale = scale
        self.flip = flip
        self.jitter = jitter
        self.ignore_index = ignore_index
        self.keep_unlabelled = keep_unlabelled

    def __call__(
        self, image: ImageLike, mask: ImageLike, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Augment one pair.

        Args:
            image: See :func:`as_image`.
            mask: See :func:`as_mask`, as large as the image.
            rng: Source of all randomness.

        Returns:
            As :func:`to_tensors`, of the crop's size.

        Raises:
            SFAError: If the sizes differ, one of the two cannot be used, or nothing is labelled.
        """
        picture, ids = _matched(image, mask)
        ids = _ignored(ids, self.ignore_index)
        picture, ids = self._scale_and_crop(picture, ids, rng)
        if rng.random() < self.flip:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            ids = ids.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.jitter:
            picture = colour_jitter(picture, self.jitter, rng)
        return to_tensors(picture, ids)

    def _scale_and_crop(
        self, picture: Image.Image, ids: Image.Image, rng: np.random.Generator
    ) -> tuple[Image.Image, Image.Image]:
        height, width = self.size
        factor = rng.uniform(*self.scale) * max(height / picture.height, width / picture.width)
        scaled = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        ids = ids.resize(scaled, Image.Resampling.NEAREST)
        labelled = np.asarray(ids) != IGNORE_INDEX
        if not (labelled.any() or self.keep_unlabelled):
            raise SFAError(
                f"no labelled pixel in the whole image, resized to {scaled[0]}x{scaled[1]}; a "
                "batch of such has no loss. Leave the image out, or pass keep_unlabelled=True"
            )
        left, top = random_window(labelled, self.size, rng)
        # Cropping outside an image fills with 0, which is a class: paste over the fill instead.
        canvas = Image.new("RGB", (width, height), FILL)
        canvas_ids = Image.new("L", (width, height), IGNORE_INDEX)
        canvas.paste(picture.resize(scaled, Image.Resampling.BILINEAR), (-left, -top))
        canvas_ids.paste(ids, (-left, -top))
        return canvas, canvas_ids


class EvalTransform:
    """Resize the image for the model, leave the mask as it is, and normalise.

    So scores are counted on the pixels of the data, as mmseg and Mask2Former count: predictions
    are brought to the labels (:func:`~sfa_peft.dense.argmax_logits`, ``DenseMaps.resized``), not
    labels to the predictions. Images of several sizes make batches of one.

    Args:
        size: Height and width that the image just covers, its shape kept, as at scale 1 of
            :class:`TrainTransform`; one number for the shorter side. By default its own size. No
            side becomes longer than four times the longer one of ``size``.
        label_size: Height and width that the mask is resized to, one number for a square: scores
            of another size than the data's own, which compare with no published ones.
        ignore_index: Id in the masks that means "not labelled"; becomes ``IGNORE_INDEX``.

    Raises:
        SFAError: If a size is not positive.
    """

    def __init__(
        self,
        size: int | tuple[int, int] | None = None,
        *,
        label_size: int | tuple[int, int] | None = None,
        ignore_index: int = IGNORE_INDEX,
    ) -> None:
        self.size = None if size is None else as_size(size)
        self.label_size = None if label_size is None else as_size(label_size)
        self.ignore_index = ignore_index

    def __call__(
        self, image: ImageLike, mask: ImageLike, rng: np.random.Generator | None = None
    ) -> dict[str, torch.Tensor]:
        """Resize the image, and the mask where that is asked for, by nearest neighbour.

        Args:
            image: See :func:`as_image`.
            mask: See :func:`as_mask`, as large as the image.
            rng: Not used; there so that both transforms are called alike.

        Returns:
            ``pixel_values``, float32 ``(3, h, w)``, and ``labels``, int64 ``(H, W)``.

        Raises:
            SFAError: If the sizes differ or one of the two cannot be used.
        """
        picture, ids = _matched(image, mask)
        ids = _ignored(ids, self.ignore_index)
        if self.size is not None:
            height, width = covering(picture.height, picture.width, self.size)
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.label_size is not None:
            height, width = self.label_size
            ids = ids.resize((width, height), Image.Resampling.NEAREST)
        return {"pixel_values": normalise(picture), "labels": _as_labels(ids)}


def _matched(image: ImageLike, mask: ImageLike) -> tuple[Image.Image, Image.Image]:
    picture, ids = as_image(image), as_mask(mask)
    if picture.size != ids.size:
        raise SFAError(
            f"image and mask must have one size, got {picture.width}x{picture.height} "
            f"and {ids.width}x{ids.height} (width x height)"
        )
    return picture, ids


def _as_labels(ids: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(ids).astype(np.int64))


def _ignored(ids: Image.Image, ignore_index: int) -> Image.Image:
    if ignore_index == IGNORE_INDEX:
        return ids
    array = np.asarray(ids)
    return Image.fromarray(np.where(array == ignore_index, np.uint8(IGNORE_INDEX), array))
