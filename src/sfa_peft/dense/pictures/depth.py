# SPDX-License-Identifier: Apache-2.0
"""Contact sheets of depth maps on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.pictures.picture_grid import (
    add_legend,
    check_rows,
    is_rgb,
    picture_grid,
    write_figure,
)
from sfa_peft.errors import SFAError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap

COLOURS = "viridis_r"  # Even steps look even, also to the colour-blind; near is bright.
INVALID_COLOUR = (0.78, 0.76, 0.74)  # Light warm grey: no colour of the scale, nor of the text.


def valid_depth(depth: NDArray[Any]) -> NDArray[np.bool_]:
    """Return where a depth map holds a depth, finite and above 0: bool of the same shape."""
    return np.isfinite(depth) & (depth > 0)


def depth_sheet(
    rows: Sequence[Sequence[NDArray[Any]]],
    titles: Sequence[str],
    path: str | Path,
    *,
    depth_range: tuple[float, float] | None = None,
    colormap: str = COLOURS,
) -> Path:
    """Draw images and depth maps in a grid: input, truth, one prediction per method.

    All depth maps share one colour scale, drawn at the right with its ends marked; a depth beyond
    them has the colour of that end. Pixels without a depth are grey.

    Args:
        rows: One row per scene; each picture is an RGB image, uint8 ``(H, W, 3)``, or depth in
            metres, floating point ``(H, W)``.
        titles: Title of each column.
        path: File to write; the suffix picks the format (png, pdf, svg, ...).
        depth_range: Metres at the ends of the scale; by default the 1st and 99th percentile of
            the first depth map of each row, the truth.
        colormap: matplotlib's name of the colours, near to far.

    Returns:
        The path written.

    Raises:
        SFAError: If there are no rows or no depth, a row has another length than the titles, a
            picture is of another kind, or the range is empty.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    check_rows(rows, titles)
    maps = [[p for p in row if not is_rgb(p)] for row in rows]
    for depth in (d for row in maps for d in row):
        if depth.ndim != 2 or depth.dtype.kind != "f":
            raise SFAError(
                "a picture is uint8 (H, W, 3) or depth in metres, floating point (H, W), got "
                f"{depth.dtype} {depth.shape}"
            )
    near, far = _range_of([row[0] for row in maps if row]) if depth_range is None else depth_range
    if not near < far:
        raise SFAError(f"depth_range: expected near < far, got {near} and {far}")
    scale, colours = Normalize(near, far, clip=True), colormaps[colormap]

    def draw(axis: Axes, picture: NDArray[Any]) -> None:
        drawn = picture if is_rgb(picture) else colour_depth(picture, scale, colours)
        axis.imshow(drawn, interpolation="nearest")

    figure, axes = picture_grid(rows, titles, draw, shape=rows[0][0].shape)
    figure.set_figwidth(figure.get_figwidth() + 0.7)  # the bar
    bar = figure.colorbar(
        ScalarMappable(scale, colours), ax=axes, shrink=0.9, label="depth (m)", extend="both"
    )
    bar.ax.invert_yaxis()  # near above, as names of colour maps have it: from the first colour on
    _mark_ends(bar, near, far)
    if not all(valid_depth(d).all() for row in maps for d in row):
        add_legend(figure, {"no depth": INVALID_COLOUR}, 1)
    return write_figure(figure, Path(path))


def _mark_ends(bar: Colorbar, near: float, far: float) -> None:
    """Write the ends of the scale at the bar: they hold all that is beyond."""
    inside = [t for t in bar.get_ticks() if 0.08 < (t - near) / (far - near) < 0.92]
    names = [f"{t:g}" for t in inside]
    bar.set_ticks([near, *inside, far], labels=[f"≤ {near:.3g}", *names, f"≥ {far:.3g}"])


def colour_depth(depth: NDArray[Any], scale: Any, colours: Colormap) -> NDArray[np.uint8]:
    """Return depth as colours.

    Args:
        depth: Metres, floating point ``(H, W)``.
        scale: Maps metres to ``[0, 1]``, such as ``matplotlib.colors.Normalize(near, far)``.
        colours: matplotlib's colour map.

    Returns:
        RGB, uint8 ``(H, W, 3)``; ``INVALID_COLOUR`` where there is no depth.
    """
    valid = valid_depth(depth)
    coloured = colours(scale(np.where(valid, depth, 1.0)))[..., :3]
    coloured[~valid] = INVALID_COLOUR
    return np.round(255 * coloured).astype(np.uint8)


def _range_of(maps: Sequence[NDArray[Any]]) -> tuple[float, float]:
    depths = np.concatenate([d[valid_depth(d)] for d in maps] or [np.empty(0)])
    if not depths.size:
        raise SFAError("no depth to draw: the first depth map of each row holds no valid pixel")
    near, far = np.percentile(depths, [1, 99])
    # One plane at one distance still needs a scale.
    return (float(near), float(far)) if near < far else (0.9 * float(near), 1.1 * float(far))
