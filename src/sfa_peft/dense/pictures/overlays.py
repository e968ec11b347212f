# SPDX-License-Identifier: Apache-2.0
"""Predictions painted over a picture, at its own size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sfa_peft.dense.pictures.depth import COLOURS, colour_depth, valid_depth
from sfa_peft.dense.pictures.objects import FIRST_COLOUR, ObjectPicture, paint_masks
from sfa_peft.dense.pictures.sheets import class_palette

OPACITY = 0.5
LEGIBLE = 256  # pixels of the shorter side that names need


def class_overlay(image: Image.Image, ids: NDArray[Any], num_classes: int) -> Image.Image:
    """Return a picture with class colours over it.

    Args:
        image: RGB.
        ids: Class ids, integers ``(H, W)`` of the picture's size.
        num_classes: Number of classes; more than 255 repeat colours.
    """
    palette = class_palette(min(num_classes, 255))
    return Image.blend(image, Image.fromarray(palette[ids % 255]), OPACITY)


def depth_picture(metres: NDArray[Any], *, colormap: str = COLOURS) -> Image.Image:
    """Return depth as colours, of this map's own nearest and farthest percent; needs matplotlib.

    Args:
        metres: Floating point ``(H, W)``; 0 where there is no depth.
        colormap: matplotlib's name of the colours, near to far.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    known = metres[valid_depth(metres)]
    near, far = np.percentile(known, [1, 99]) if known.size else (0.0, 1.0)
    scale = Normalize(float(near), float(max(far, near + 1e-6)), clip=True)
    return Image.fromarray(colour_depth(metres, scale, colormaps[colormap]))


def object_overlay(
    image: Image.Image, objects: Mapping[str, Any], class_names: Sequence[str]
) -> Image.Image:
    """Return a picture with objects over it: masks where there are any, else boxes; names, scores.

    A small picture is enlarged a whole number of times, so that names hide nothing.

    Args:
        image: RGB.
        objects: As :func:`~sfa_peft.dense.predict` returns them.
        class_names: Name of class id 0, 1, ...
    """
    labels, masks = objects["labels"], objects.get("masks")
    factor = -(-LEGIBLE // min(image.size))
    image = image.resize((factor * image.width, factor * image.height), Image.Resampling.NEAREST)
    palette = class_palette(255)[FIRST_COLOUR:]
    chosen = labels if masks is None else np.arange(len(labels))
    colours = palette[chosen % len(palette)]
    painted = image
    if masks is not None:
        large = masks.repeat(factor, 1).repeat(factor, 2)
        drawn = ObjectPicture(np.asarray(image), labels, masks=large)
        painted = Image.fromarray(paint_masks(drawn, list(colours / 255.0)))
    draw = ImageDraw.Draw(painted := painted.copy())
    font = ImageFont.load_default(max(11, min(image.size) // 45))
    # The surest last, so that its name is on top.
    for i in reversed(range(len(labels))):
        box, colour = (factor * objects["boxes"][i]).tolist(), tuple(colours[i].tolist())
        if masks is None:
            draw.rectangle(box, outline=colour, width=max(2, min(image.size) // 250))
        text = f"{class_names[labels[i]]} {objects['scores'][i]:.2f}"
        corner = (max(0.0, box[0]), max(0.0, box[1]))
        draw.rectangle(draw.textbbox(corner, text, font), fill=colour)
        draw.text(corner, text, "white" if _is_dark(colour) else "black", font)
    return painted


def _is_dark(colour: Sequence[int]) -> bool:
    return float(np.dot(colour, (0.299, 0.587, 0.114))) < 140
