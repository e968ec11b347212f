# SPDX-License-Identifier: Apache-2.0
"""Read one image, mask or depth file; whatever cannot be read right is refused by its name."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from sfa_peft.dense.data.depth import DepthMap
from sfa_peft.dense.data.transforms import IGNORE_INDEX, as_image, as_mask
from sfa_peft.errors import SFAError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")

IdTable = NDArray[np.int16]  # New id by stored id, (256,); -1 where a stored id must not occur.


def decode(source: Path | io.BytesIO, name: str) -> Image.Image:
    """Decode an image as it is stored.

    Args:
        source: File or its bytes.
        name: What the error calls it.

    Returns:
        The image, of whatever mode.

    Raises:
        SFAError: If it is missing, damaged or no image.
    """
    try:
        with Image.open(source) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # PIL reports broken files by any of these, and not always with the file's name.
        raise SFAError(f"`{name}`: cannot read this image: {error}") from error


def read_image(path: Path) -> Image.Image:
    """Return a photograph, upright as its EXIF orientation says; raises SFAError by its name."""
    return upright(decode(path, str(path)), str(path))


def upright(image: Image.Image, name: str) -> Image.Image:
    """Return a photograph, upright as its EXIF orientation says, of 8 bits a channel.

    Args:
        image: As it is stored.
        name: What the error calls it.

    Raises:
        SFAError: If its samples are of floats or of more than 16 bits.
    """
    turned = ImageOps.exif_transpose(image)
    if not turned.mode.startswith(("I", "F")):
        return turned
    try:
        return as_image(turned)
    except SFAError as error:
        raise SFAError(f"`{name}`: {error}") from error


def read_mask(path: Path, table: IdTable | None = None) -> Image.Image:
    """Return a mask of class ids.

    Args:
        path: File of one channel.
        table: Stored ids to class ids; by default ids stay as they are.

    Returns:
        PIL image of mode L, or of its own mode without a table.

    Raises:
        SFAError: If it cannot be read, or holds an id that the table does not know.
    """
    mask = decode(path, str(path))
    return mask if table is None else map_ids(mask, table, f"`{path}`")


def map_ids(mask: Image.Image, table: IdTable, name: str) -> Image.Image:
    """Return a mask with its ids looked up in a table; raises SFAError, by ``name``, for others."""
    try:
        stored = np.asarray(as_mask(mask))
    except SFAError as error:
        raise SFAError(f"{name}: {error}") from error
    mapped = table[stored]
    if mapped.min(initial=0) < 0:
        wrong = np.unique(stored[mapped < 0]).tolist()
        raise SFAError(
            f"{name}: the mask holds ids {wrong[:8]}, which are no classes; expected "
            f"{_runs(np.flatnonzero(table >= 0))}. Check the list of classes, which id means 'not "
            "labelled' (ignore_index=), and whether the mask is of another data set or format"
        )
    return Image.fromarray(mapped.astype(np.uint8))


def _runs(ids: NDArray[np.intp]) -> str:
    """Return rising ids as text, runs of them joined, of many the first: "0 to 10, 255"."""
    if not len(ids):
        return "none at all"
    runs = np.split(ids, np.flatnonzero(np.diff(ids) > 1) + 1)
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:6], "...", texts[-1]])


def id_table(known: Mapping[int, int], ignored: Iterable[int] = ()) -> IdTable:
    """Return a table for :func:`read_mask`.

    Args:
        known: Class id by stored id, each in ``[0, 254]``.
        ignored: Stored ids that mean "not labelled".

    Returns:
        The table; every other stored id is an error.

    Raises:
        SFAError: If an id is out of range.
    """
    ignored = tuple(ignored)
    if wrong := [stored for stored in (*known, *ignored) if not 0 <= stored <= 255]:
        raise SFAError(f"ids in masks must be in [0, 255], got {wrong[:8]}")
    if max(known.values(), default=0) >= IGNORE_INDEX:
        raise SFAError(f"at most {IGNORE_INDEX} classes fit beside the ignored id {IGNORE_INDEX}")
    table = np.full(256, -1, np.int16)
    for stored, class_id in known.items():
        table[stored] = class_id
    table[list(ignored)] = IGNORE_INDEX
    return table


def read_depth(path: Path, scale: float) -> DepthMap:
    """Return the metric depth of an image file.

    Args:
        path: 16 or 32-bit grey PNG (or TIFF) of integers, or 32-bit float TIFF of metres.
        scale: Stored units per metre, for integers: 1000 for NYUv2, 256 for KITTI.

    Returns:
        Metres, float32 ``(H, W)``; 0 where not measured.

    Raises:
        SFAError: If it cannot be read, or is of 8 bits or of colours, so a picture of depth.
    """
    return metres_of(decode(path, str(path)), scale, str(path))


def metres_of(image: Image.Image, scale: float, name: str) -> DepthMap:
    """Return the metric depth of a decoded image; see :func:`read_depth`."""
    if image.mode == "F":
        return np.asarray(image, np.float32)
    if not image.mode.startswith("I"):
        raise SFAError(
            f"`{name}`: expected depth as 16-bit integers or 32-bit floats, got mode "
            f"{image.mode}; 8 bits or colours are a picture of depth, not metres"
        )
    return (np.asarray(image).astype(np.float64) / scale).astype(np.float32)
