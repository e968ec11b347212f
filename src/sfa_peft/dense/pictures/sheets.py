# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of class maps and plots of curves, written atomically to image files.

matplotlib is imported inside the functions and used without pyplot, so nothing global is changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.pictures.picture_grid import (
    add_legend,
    check_rows,
    grid_width,
    is_rgb,
    legend_lines,
    picture_grid,
    write_figure,
)
from sfa_peft.errors import SFAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_VOID = (255, 255, 255)  # White: the colour of ids without a class, such as the ignore index.
# Told apart by the colour-blind too: Okabe and Ito's colours and Tol's, sky and ground first.
_COLOURS = (
    (136, 204, 238),
    (120, 120, 120),
    (204, 51, 17),
    (230, 159, 0),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (0, 80, 40),
    (0, 114, 178),
    (136, 34, 85),
    (221, 204, 119),
    (51, 34, 136),
)


def class_palette(num_classes: int) -> NDArray[np.uint8]:
    """Return one colour per class, and white for every other id a mask can hold.

    Args:
        num_classes: Number of classes, 1 to 255.

    Returns:
        RGB by class id, uint8 ``(256, 3)``; the first twelve are hand-picked.

    Raises:
        SFAError: If the number of classes is out of range.
    """
    if not 1 <= num_classes <= 255:
        raise SFAError(f"a palette holds 1 to 255 classes, got {num_classes}")
    palette = np.full((256, 3), _VOID, np.uint8)
    # A fixed seed: colours of large label sets must be the same in every picture.
    spare = np.random.default_rng(0).integers(30, 226, (256, 3))
    palette[:num_classes] = spare[:num_classes]
    known = min(num_classes, len(_COLOURS))
    palette[:known] = _COLOURS[:known]
    return palette


def contact_sheet(
    rows: Sequence[Sequence[NDArray[Any]]],
    titles: Sequence[str],
    path: str | Path,
    *,
    class_names: Sequence[str],
    palette: NDArray[np.uint8] | None = None,
) -> Path:
    """Draw pictures in a grid: input, truth, one prediction per method, with a legend of classes.

    Args:
        rows: One row per scene; each picture is an RGB image, uint8 ``(H, W, 3)``, or a map of
            class ids, integers ``(H, W)``.
        titles: Title of each column.
        path: File to write; the suffix picks the format (png, pdf, svg, ...).
        class_names: Name of class id 0, 1, ...
        palette: RGB by class id, uint8 ``(256, 3)``; by default :func:`class_palette`.

    Returns:
        The path written.

    Raises:
        SFAError: If there are no rows, or a row has another length than the titles.
    """
    check_rows(rows, titles)
    colours = class_palette(len(class_names)) if palette is None else palette
    columns, lines = legend_lines(class_names, grid_width(titles))

    def draw(axis: Axes, picture: NDArray[Any]) -> None:
        axis.imshow(_coloured(picture, colours), interpolation="nearest")

    figure, _ = picture_grid(rows, titles, draw, shape=rows[0][0].shape, extra_height=0.18 * lines)
    present = {int(i) for row in rows for p in row if p.ndim == 2 for i in np.unique(p)}
    legend = {n: colours[i] / 255.0 for i, n in enumerate(class_names) if i in present}
    if present - set(range(len(class_names))):
        legend["not labelled"] = "white"
    add_legend(figure, legend, columns)
    return write_figure(figure, Path(path))


def curve_plot(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str,
    title: str | None = None,
) -> Path:
    """Draw named curves into one diagram.

    Args:
        curves: For each name the x and the y values, equally many; nan leaves a gap.
        path: File to write; the suffix picks the format (png, pdf, svg, ...).
        xlabel: What x is, with its unit.
        ylabel: What y is, with its unit.
        title: Heading, if any.

    Returns:
        The path written.

    Raises:
        SFAError: If there is no curve or one has unequally many x and y.
    """
    from matplotlib.figure import Figure

    if not curves:
        raise SFAError("no curves to draw")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.subplots()
    # Markers differ too, so that the curves can be told apart in grey.
    for (name, (x, y)), marker in zip(curves.items(), _markers(len(curves)), strict=True):
        if len(x) != len(y):
            raise SFAError(f"curve `{name}` has {len(x)} x values and {len(y)} y values")
        axis.plot(x, y, label=name, marker=marker, markersize=4, linewidth=1.4)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    if title is not None:
        axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return write_figure(figure, Path(path))


def _markers(count: int) -> list[str]:
    return ["os^Dv<>Pp*X"[i % 11] for i in range(count)]


def _coloured(picture: NDArray[Any], colours: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if is_rgb(picture):
        return picture
    if picture.ndim == 2 and picture.dtype.kind in "biu":
        return colours[np.clip(picture, 0, 255).astype(np.uint8)]
    raise SFAError(
        "a picture is uint8 (H, W, 3) or integer class ids (H, W), "
        f"got {picture.dtype} {picture.shape}"
    )
