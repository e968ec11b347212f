# SPDX-License-Identifier: Apache-2.0
"""What all sheets share: a grid of pictures, the class legend, and files that appear whole.

matplotlib is imported inside the functions and used without pyplot, so nothing global is changed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sfa_peft.errors import SFAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Picture = TypeVar("Picture")
TRUTH = "truth"  # the column that is framed: what no model has made
PIXELS_AN_INCH, LARGEST_COLUMN = 170, 3.6  # of a sheet; inches


def picture_grid(
    rows: Sequence[Sequence[Picture]],
    titles: Sequence[str],
    draw: Callable[[Axes, Picture], None],
    *,
    shape: tuple[int, ...],
    extra_height: float = 0.0,
    column_width: float = 1.7,
) -> tuple[Figure, NDArray[Any]]:
    """Draw pictures into a grid of axes without ticks; a column titled "truth" is framed.

    Args:
        rows: One row per scene, checked by :func:`check_rows`.
        titles: Title of each column.
        draw: Draws one picture into its axes.
        shape: Height and width of a picture, which give the rows their height.
        extra_height: Inches to leave below the grid.
        column_width: Inches of each column; more for pictures of many pixels.

    Returns:
        The figure and its axes, ``(rows, columns)``.
    """
    from matplotlib.figure import Figure

    # Large pictures get more of the sheet, so that what is small in them can be seen.
    column_width = max(column_width, min(shape[1] / PIXELS_AN_INCH, LARGEST_COLUMN))
    width = grid_width(titles, column_width)
    row_height = width / len(titles) * shape[0] / shape[1]
    height = (row_height + 0.05) * len(rows) + 0.3 + extra_height
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row, axes_row in zip(rows, axes, strict=True):
        for picture, axis in zip(row, axes_row, strict=True):
            draw(axis, picture)
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=9, fontweight="bold" if title == TRUTH else "normal")
    if TRUTH in titles:
        for axis in axes[:, list(titles).index(TRUTH)]:
            _frame(axis)
    return figure, axes


def _frame(axis: Axes) -> None:
    from matplotlib.patches import Rectangle

    style = {"fill": False, "edgecolor": "black", "linewidth": 2, "clip_on": False}
    axis.add_patch(Rectangle((0, 0), 1, 1, transform=axis.transAxes, **style))


def check_rows(rows: Sequence[Sequence[Any]], titles: Sequence[str]) -> None:
    """Raise an SFAError unless every row has one picture per title."""
    if not rows or any(len(row) != len(titles) for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise SFAError(f"each row needs {len(titles)} pictures, one per title; rows have {lengths}")


def grid_width(titles: Sequence[str], column_width: float = 1.7) -> float:
    """Return the width of a grid of pictures in inches."""
    return max(column_width * len(titles), 2.5)


def legend_lines(names: Sequence[str], width: float) -> tuple[int, int]:
    """Return how many columns a legend of these names has in ``width`` inches, and its lines."""
    # In inches: letters of the legend are about 0.08 wide, its patches and gaps 0.6.
    columns = max(1, int(width / (0.08 * max(map(len, names), default=1) + 0.6)))
    return columns, -(-(len(names) + 1) // columns)


def add_legend(figure: Figure, colours: dict[str, Any], columns: int) -> None:
    """Write a legend of coloured patches below the grid."""
    from matplotlib.patches import Patch

    patches = [
        Patch(facecolor=colour, edgecolor="0.4", label=name) for name, colour in colours.items()
    ]
    if patches:
        figure.legend(
            handles=patches,
            loc="outside lower center",
            ncols=columns,
            fontsize=7,
            frameon=False,
        )


def is_rgb(picture: Any) -> bool:
    """Return whether a picture is an RGB image, uint8 ``(H, W, 3)``."""
    return (
        isinstance(picture, np.ndarray)
        and picture.ndim == 3
        and picture.shape[2] == 3
        and picture.dtype == np.uint8
    )


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure to a file that never holds half a picture.

    Args:
        figure: The figure.
        path: File to write; the suffix picks the format; missing folders are made.

    Returns:
        The path.
    """
    # Rename at the end: a reader, or an interrupted run, never meets half a file.
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        figure.savefig(temporary, dpi=150)
        temporary.chmod(0o644)  # mkstemp makes files that only their owner may read.
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
