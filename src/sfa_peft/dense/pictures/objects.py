# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of detected objects: boxes and instance masks, with classes and scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.pictures.picture_grid import check_rows, is_rgb, picture_grid, write_figure
from sfa_peft.dense.pictures.sheets import class_palette
from sfa_peft.errors import SFAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MASK_OPACITY = 0.55
# The palette begins with sky and ground: objects take the colours after those.
FIRST_COLOUR = 2


@dataclass(frozen=True)
class ObjectPicture:
    """An image and the objects in it, true or predicted.

    Attributes:
        image: RGB, uint8 ``(H, W, 3)``.
        classes: Class id of each object, integers ``(N,)``.
        boxes: Left, top, right and bottom in pixels, ``(N, 4)``, drawn if given.
        masks: Pixels of each object, bool ``(N, H, W)``, drawn if given.
        scores: Confidence of each, ``(N,)``, written beside the class if given.
        crowds: Which of them stand for several, bool ``(N,)``: drawn dashed, masks as a rim only.

    Raises:
        SFAError: If a shape does not fit, or there is neither a box nor a mask to draw.
    """

    image: NDArray[np.uint8]
    classes: NDArray[Any]
    boxes: NDArray[Any] | None = None
    masks: NDArray[np.bool_] | None = None
    scores: NDArray[Any] | None = None
    crowds: NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        if not is_rgb(self.image):
            got = f"{self.image.dtype} {self.image.shape}"
            raise SFAError(f"image of objects: expected uint8 (H, W, 3), got {got}")
        count, size = len(self.classes), self.image.shape[:2]
        if self.boxes is None and self.masks is None:
            raise SFAError("objects need boxes or masks to be drawn")
        for name, wanted in (
            ("boxes", (count, 4)),
            ("masks", (count, *size)),
            ("scores", (count,)),
            ("crowds", (count,)),
        ):
            value = getattr(self, name)
            if value is not None and value.shape != wanted:
                raise SFAError(f"{name} of {count} objects: expected {wanted}, got {value.shape}")


def object_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8] | ObjectPicture]],
    titles: Sequence[str],
    path: str | Path,
    *,
    class_names: Sequence[str],
) -> Path:
    """Draw images and their objects in a grid: input, truth, one prediction per method.

    Boxes have the colour of their class. Masks have one colour per object, so that two of a class
    can be told apart. Class and score are written at the object.

    Args:
        rows: One row per scene; each picture is an RGB image, uint8 ``(H, W, 3)``, or an
            :class:`ObjectPicture`.
        titles: Title of each column.
        path: File to write; the suffix picks the format (png, pdf, svg, ...).
        class_names: Name of class id 0, 1, ...

    Returns:
        The path written.

    Raises:
        SFAError: If there are no rows, a row has another length than the titles, a picture is of
            another kind, or a class id has no name.
    """
    check_rows(rows, titles)
    palette = class_palette(255)[FIRST_COLOUR:] / 255.0

    def draw(axis: Axes, picture: NDArray[np.uint8] | ObjectPicture) -> None:
        _draw(axis, picture, class_names, palette)

    first = rows[0][0]
    shape = (first.image if isinstance(first, ObjectPicture) else first).shape
    # Wider than other sheets: names and scores must be legible.
    figure, _ = picture_grid(rows, titles, draw, shape=shape, column_width=2.3)
    return write_figure(figure, Path(path))


def _draw(
    axis: Axes,
    picture: NDArray[np.uint8] | ObjectPicture,
    class_names: Sequence[str],
    palette: NDArray[np.float64],
) -> None:
    if not isinstance(picture, ObjectPicture):
        if not is_rgb(picture):
            raise SFAError(
                f"a picture is uint8 (H, W, 3) or an ObjectPicture, got {type(picture).__name__}"
            )
        axis.imshow(picture, interpolation="nearest")
        return
    ids = [int(i) for i in picture.classes]
    if ids and not 0 <= min(ids) <= max(ids) < len(class_names):
        raise SFAError(f"class ids {min(ids)} to {max(ids)}, but {len(class_names)} class names")
    by_class = picture.masks is None
    colours = [palette[(c if by_class else i) % len(palette)] for i, c in enumerate(ids)]
    axis.imshow(paint_masks(picture, colours), interpolation="nearest")
    # In order of score, so that the surest object's name is on top.
    order = range(len(ids)) if picture.scores is None else np.argsort(picture.scores)
    for i in order:
        if picture.boxes is not None:
            _draw_box(axis, picture.boxes[i], colours[i], "--" if _is_crowd(picture, i) else "-")
        corner = _corner(picture, i)
        if corner is not None:
            score = "" if picture.scores is None else f" {picture.scores[i]:.2f}"
            crowd = " (crowd)" if _is_crowd(picture, i) else ""
            _write_name(axis, corner, class_names[ids[i]] + score + crowd, colours[i])


def _is_crowd(picture: ObjectPicture, index: int) -> bool:
    return picture.crowds is not None and bool(picture.crowds[index])


def paint_masks(picture: ObjectPicture, colours: Sequence[Any]) -> NDArray[np.uint8]:
    """Return the image with its masks painted on, each with a darker rim.

    Args:
        picture: The image and its objects.
        colours: RGB of each object, 0 to 1.

    Returns:
        RGB, uint8 ``(H, W, 3)``; where masks overlap, the later is on top. The image itself if
        there are no masks.
    """
    if picture.masks is None:
        return picture.image
    painted = picture.image.astype(np.float64)
    for i, (mask, colour) in enumerate(zip(picture.masks.astype(bool), colours, strict=True)):
        paint = 255 * np.asarray(colour)
        if not _is_crowd(picture, i):
            painted[mask] += MASK_OPACITY * (paint - painted[mask])
        painted[mask & ~_eroded(mask)] = 0.6 * paint
    return np.round(painted).astype(np.uint8)


def _eroded(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    # A pixel stays if its four neighbours are in the mask; beyond the image counts as in.
    padded = np.pad(mask, 1, constant_values=True)
    return padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]


def _corner(picture: ObjectPicture, index: int) -> tuple[float, float] | None:
    if picture.boxes is not None:
        left, top = picture.boxes[index][:2]
        return float(left) - 0.5, float(top) - 0.5
    # An empty mask has no place for a name.
    rows, columns = np.nonzero(np.zeros((0, 0)) if picture.masks is None else picture.masks[index])
    return (float(columns.min()), float(rows.min())) if len(rows) else None


def _draw_box(axis: Axes, box: NDArray[Any], colour: Any, line: str) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (float(edge) for edge in box)
    # imshow centres pixels on whole numbers, boxes lie on the edges between pixels.
    corner, width, height = (left - 0.5, top - 0.5), right - left, bottom - top
    style = {"edgecolor": colour, "linewidth": 1.4, "linestyle": line}
    axis.add_patch(Rectangle(corner, width, height, fill=False, **style))


def _write_name(axis: Axes, corner: tuple[float, float], text: str, colour: Any) -> None:
    dark = float(np.dot(colour, (0.299, 0.587, 0.114))) < 0.55
    bottom, top = axis.get_ylim()  # rows of the image, the last one first
    # Above the object, or within it where the image ends.
    is_at_top = corner[1] - top < 0.08 * (bottom - top)
    axis.text(
        *corner,
        text,
        fontsize=5,
        color="white" if dark else "black",
        verticalalignment="top" if is_at_top else "bottom",
        clip_on=True,
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
    )
