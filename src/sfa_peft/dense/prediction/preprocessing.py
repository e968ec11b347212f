# SPDX-License-Identifier: Apache-2.0
"""What happens to a picture before a model sees it, as in the evaluation of its training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch.nn.functional import pad

from sfa_peft.dense.data.depth import kitti_benchmark_crop
from sfa_peft.dense.data.files import read_image, upright
from sfa_peft.dense.data.geometry import covering
from sfa_peft.dense.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Colour,
    ImageLike,
    as_image,
    normalise,
)
from sfa_peft.errors import SFAError

Size = tuple[int, int]  # height and width

RESIZES = ("cover", "stretch", "keep")
CROPS: dict[str, Callable[[int, int], tuple[int, int, int, int]]] = {"kitti": kitti_benchmark_crop}


class Frame(NamedTuple):
    """Where a picture lies in what a model sees.

    Attributes:
        box: What of the picture is used: left, top, right and bottom in its own pixels.
        size: Height and width that this is resized to.
        padded: Height and width of the model's input; the picture is in its top left corner.
    """

    box: tuple[int, int, int, int]
    size: Size
    padded: Size


@dataclass(frozen=True)
class Preprocessing:
    """From a picture to a model's input.

    Attributes:
        resize: "cover": the shape is kept and the picture just covers ``size``, as
            :class:`~sfa_peft.dense.EvalTransform` does; "stretch": it becomes ``size``, as
            :class:`~sfa_peft.dense.ObjectResize` does; "keep": it stays as it is.
        size: Height and width in pixels; None with "keep".
        size_divisor: The input is padded with 0, right and below, to multiples of this.
        crop: "kitti" for KITTI's benchmark crop, or None.
        mean: Of red, green and blue in [0, 1]; subtracted.
        std: Of the same; divided by.

    Raises:
        SFAError: If a value is none of these.
    """

    resize: str
    size: Size | None = None
    size_divisor: int = 1
    crop: str | None = None
    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD

    def __post_init__(self) -> None:
        if self.resize not in RESIZES or (self.crop is not None and self.crop not in CROPS):
            raise SFAError(
                f"Preprocessing: expected resize one of {', '.join(RESIZES)} and crop None or one "
                f"of {', '.join(CROPS)}, got {self.resize!r} and {self.crop!r}"
            )
        if (self.size is None) != (self.resize == "keep"):
            raise SFAError(f"Preprocessing: resize={self.resize!r} with size={self.size}")
        sides = (*(self.size or ()), self.size_divisor)
        numbers = (*self.mean, *self.std)
        if min(sides) < 1 or len(numbers) != 6 or not all(s > 0 for s in self.std):
            raise SFAError(
                "Preprocessing: expected sizes of 1 or more, three means and three deviations "
                f"above 0, got {sides}, {self.mean} and {self.std}"
            )

    def frame(self, size: Size) -> Frame:
        """Return where a picture of a height and width comes to lie.

        Raises:
            SFAError: If it is smaller than the crop.
        """
        height, width = size
        box = CROPS[self.crop](height, width) if self.crop else (0, 0, width, height)
        inner = (box[3] - box[1], box[2] - box[0])
        if self.size is not None:
            inner = covering(*inner, self.size) if self.resize == "cover" else self.size
        step = self.size_divisor
        padded = (-(-inner[0] // step) * step, -(-inner[1] // step) * step)
        return Frame(box, inner, padded)

    def prepare(self, picture: Image.Image) -> torch.Tensor:
        """Return a picture, RGB and upright, as float32 ``(3, H, W)``, padded."""
        frame = self.frame((picture.height, picture.width))
        if self.crop is not None:
            picture = picture.crop(frame.box)
        height, width = frame.size
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        right, below = frame.padded[1] - width, frame.padded[0] - height
        return pad(normalise(picture, self.mean, self.std), (0, right, 0, below))


def as_picture(image: str | Path | ImageLike) -> Image.Image:
    """Return a picture as RGB, upright as its EXIF orientation says.

    Args:
        image: A file, a PIL image, or uint8 ``(H, W, 3)`` or ``(H, W)``.

    Raises:
        SFAError: If it cannot be read or is of floats.
    """
    if isinstance(image, (str, Path)):
        return as_image(read_image(Path(image)))
    if isinstance(image, Image.Image):
        return as_image(upright(image, "image"))
    return as_image(image)
