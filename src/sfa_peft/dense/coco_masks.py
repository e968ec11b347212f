# SPDX-License-Identifier: Apache-2.0
"""COCO's masks, by the library that scores them: polygons, run lengths, run lengths as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfa_peft.errors import SFAError

Mask = NDArray[np.bool_]

# How far from the image a corner of a polygon may lie, in sides of the image: the library walks
# along every edge, so that a slip of a few digits would cost all memory.
_FARTHEST = 10


def coco_library() -> Any:
    """Import faster-coco-eval, which the base installation does not bring.

    Returns:
        The package.

    Raises:
        SFAError: If it is not installed.
    """
    try:
        import faster_coco_eval
    except ImportError as error:
        raise SFAError(
            "COCO's masks and scores need faster-coco-eval: pip install 'sfa-peft[detection]'"
        ) from error
    return faster_coco_eval


def encode_masks(masks: Mask) -> list[dict[str, Any]]:
    """Return masks as COCO's run lengths.

    Args:
        masks: Bool ``(N, H, W)``.

    Returns:
        For each ``{"size": [H, W], "counts": bytes}``.

    Raises:
        SFAError: If faster-coco-eval is not installed.
    """
    # COCO counts runs down the columns: (N, H, W) -> (H, W, N) in Fortran order.
    down = np.ascontiguousarray(masks.transpose(0, 2, 1)).view(np.uint8)
    return list(coco_library().mask.encode(down.transpose(2, 1, 0)))


def decode_mask(written: Any, height: int, width: int) -> Mask:
    """Return the mask that a COCO ``segmentation`` entry stands for, as COCO's own code makes it.

    Args:
        written: List of polygons ``[x0, y0, x1, y1, ...]``, or ``{"size": [h, w], "counts": ...}``
            with run lengths as a list or as COCO's text.
        height: Of the image, pixels.
        width: Of the image, pixels.

    Returns:
        Bool ``(height, width)``.

    Raises:
        SFAError: If it is none of these, damaged, of another size, or faster-coco-eval is not
            installed.
    """
    library = coco_library().mask
    if isinstance(written, Mapping):
        plain = _runs(written, height, width)
    elif isinstance(written, Sequence) and not isinstance(written, (str, bytes)) and written:
        plain = [_polygon(polygon, height, width) for polygon in written]
    else:
        raise SFAError(f"expected polygons or run lengths, got {str(written)[:60]!r}")
    try:
        if isinstance(plain, list):
            runs = library.merge(library.frPyObjects(plain, height, width))
        else:
            is_text = isinstance(plain["counts"], (str, bytes))
            runs = plain if is_text else library.frPyObjects(plain, height, width)
        return library.decode(runs).astype(bool)
    except (RuntimeError, ValueError) as error:  # the library's ways of saying so
        raise SFAError(f"run lengths cannot be read; a cut file? {error}") from error


def _runs(written: Mapping[str, Any], height: int, width: int) -> dict[str, Any]:
    if list(written.get("size") or ()) != [height, width] or written.get("counts") is None:
        raise SFAError(
            f"run lengths: expected counts and the size [{height}, {width}] of the image, got "
            f"the keys {sorted(written)} and size {written.get('size')}"
        )
    counts = written["counts"]
    if isinstance(counts, (str, bytes)):
        return {"size": [height, width], "counts": counts}
    lengths = np.asarray(counts)
    is_good = lengths.ndim == 1 and lengths.dtype.kind in "iu" and (lengths >= 0).all()
    if not is_good or lengths.sum() != height * width:
        got = f"the sum {lengths.sum()}" if is_good else f"{str(counts)[:60]}"
        raise SFAError(
            f"run lengths: expected whole numbers of 0 or more with the sum {height * width} of a "
            f"{width}x{height} image, got {got}"
        )
    return {"size": [height, width], "counts": lengths.tolist()}


def _polygon(polygon: Any, height: int, width: int) -> list[float]:
    try:
        corners = np.asarray(polygon, np.float64)
    except (TypeError, ValueError) as error:
        raise SFAError(f"polygon: expected numbers, got {str(polygon)[:60]!r}") from error
    # Of 4 numbers the library would make a box.
    if corners.ndim != 1 or corners.size < 6 or corners.size % 2 or not np.isfinite(corners).all():
        raise SFAError(
            f"polygon: expected x, y of 3 corners or more, got {corners.size} numbers"
            + ("" if np.isfinite(corners).all() else ", not all finite")
        )
    if np.abs(corners).max() > _FARTHEST * max(height, width):
        raise SFAError(
            f"polygon: a corner at {corners[np.abs(corners).argmax()]:g} is far beyond the "
            f"{width}x{height} image; expected pixels"
        )
    return corners.tolist()
