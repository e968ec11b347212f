# SPDX-License-Identifier: Apache-2.0
"""Maps of class scores or depth from any dense model: whole images, sliding windows, padding.

Every function returns float32 maps at the size of the image it was given, whatever size and dtype
the model answers in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional

from sfa_peft.errors import SFAError

Model = Callable[..., Any]
Size = tuple[int, int]


class DenseMaps(NamedTuple):
    """What a model says about every pixel.

    Args:
        values: float32 ``(B, C, H, W)``; C is 1 for depth.
        kind: ``"logits"``; ``"scores"``, which are 0 or more and need no softmax (Mask2Former); or
            ``"depth"`` in the model's unit.
    """

    values: torch.Tensor
    kind: Literal["logits", "scores", "depth"]

    def resized(self, size: Size) -> DenseMaps:
        """Return the maps at another size, bilinear between half-pixel centres."""
        return self._replace(values=resize(self.values, size))

    def flipped(self) -> DenseMaps:
        """Return the maps mirrored left to right."""
        return self._replace(values=self.values.flip(-1))

    def probabilities(self) -> torch.Tensor:
        """Return class probabilities ``(B, C, H, W)``.

        Logits go through a softmax over the classes, a single logit through a sigmoid; scores stay
        as they are: their sum over the classes may differ from 1.

        Raises:
            SFAError: If these are depths.
        """
        if self.kind == "depth":
            raise SFAError("the model predicts depth, not classes; use predict_depth")
        if self.kind == "scores":
            return self.values
        return self.values.sigmoid() if self.values.shape[1] == 1 else self.values.softmax(1)


def resize(maps: torch.Tensor, size: Size) -> torch.Tensor:
    """Resize ``(B, C, h, w)`` bilinearly, ``align_corners=False``, to ``size``; float32."""
    maps = maps.float()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def dense_maps(outputs: Any, size: Size) -> DenseMaps:
    """Read the outputs of a dense model.

    Args:
        outputs: An object or dict with ``logits`` ``(B, C, h, w)``; or with
            ``class_queries_logits`` ``(B, Q, C + 1)`` and ``masks_queries_logits``
            ``(B, Q, h, w)`` as of MaskFormer and Mask2Former; or with ``predicted_depth``
            ``(B, h, w)`` or ``(B, 1, h, w)``.
        size: Height and width of the model's input, to which the maps are resized.

    Returns:
        The maps. Those of queries are ``sum over q of softmax(class_q)[:-1] * sigmoid(mask_q)``,
        with the mask logits resized before the sigmoid.

    Raises:
        SFAError: If the outputs are none of these.
    """
    classes = _field(outputs, "class_queries_logits")
    masks = _field(outputs, "masks_queries_logits")
    if classes is not None and masks is not None:
        shares = classes.float().softmax(-1)[..., :-1]  # the last class is "no object"
        inside = resize(masks, size).sigmoid()
        return DenseMaps(torch.einsum("bqc,bqhw->bchw", shares, inside), "scores")
    depth = _field(outputs, "predicted_depth")
    if depth is not None and (depth.ndim == 3 or (depth.ndim == 4 and depth.shape[1] == 1)):
        return DenseMaps(resize(depth if depth.ndim == 4 else depth[:, None], size), "depth")
    logits = _field(outputs, "logits")
    if logits is not None and logits.ndim == 4:
        return DenseMaps(resize(logits, size), "logits")
    shapes = {
        name: tuple(value.shape)
        for name, value in (("predicted_depth", depth), ("logits", logits))
        if value is not None
    }
    raise SFAError(
        "expected outputs with logits (B, C, h, w), predicted_depth (B, h, w), or class and mask "
        f"queries, got {type(outputs).__name__} {shapes or 'without any of them'}"
    )


@torch.no_grad()
def whole_image_maps(
    model: Model, pixel_values: torch.Tensor, *, size_divisor: int = 1
) -> DenseMaps:
    """Run a model once over whole images.

    Args:
        model: Called as ``model(pixel_values=...)``; must be in eval mode.
        pixel_values: Normalised images ``(B, 3, H, W)``.
        size_divisor: The model's input is padded with zeros, right and below, to multiples of
            this; the padding is cut off the maps.

    Returns:
        Maps ``(B, C, H, W)``.

    Raises:
        SFAError: If the model trains, the images or the divisor are malformed, or the outputs are
            not dense.
    """
    if getattr(model, "training", False):
        raise SFAError("the model is in training mode; call model.eval() first")
    if size_divisor < 1:
        raise SFAError(f"size_divisor must be 1 or more, got {size_divisor}")
    height, width = image_size(pixel_values)
    below, right = -height % size_divisor, -width % size_divisor
    padded = functional.pad(pixel_values, (0, right, 0, below))
    maps = dense_maps(model(pixel_values=padded), (height + below, width + right))
    if len(maps.values) != len(pixel_values):
        raise SFAError(f"{len(pixel_values)} images went in, {len(maps.values)} maps came out")
    return maps._replace(values=maps.values[..., :height, :width])


def sliding_window_maps(
    model: Model,
    pixel_values: torch.Tensor,
    *,
    crop_size: int | Size,
    stride: int | Size,
    size_divisor: int = 1,
) -> DenseMaps:
    """Run a model over overlapping windows and average what it says about each pixel, as mmseg.

    The last window of each row and column is moved back to end at the border. An image smaller
    than the window is one window.

    Args:
        model: As in :func:`whole_image_maps`.
        pixel_values: Normalised images ``(B, 3, H, W)``.
        crop_size: Size of a window in pixels: one number or height and width.
        stride: Distance between windows, at most ``crop_size``.
        size_divisor: As in :func:`whole_image_maps`, for each window.

    Returns:
        Maps ``(B, C, H, W)``: at each pixel the mean over the windows that hold it, of logits
        before any softmax.

    Raises:
        SFAError: If a size is below 1 or the stride leaves gaps, and as :func:`whole_image_maps`.
    """
    crop, step = _pair(crop_size, "crop_size"), _pair(stride, "stride")
    if step[0] > crop[0] or step[1] > crop[1]:
        raise SFAError(f"a stride of {step} leaves gaps between windows of {crop}")
    height, width = image_size(pixel_values)
    rows = window_starts(height, crop[0], step[0])
    columns = window_starts(width, crop[1], step[1])
    total: torch.Tensor | None = None
    kind: Literal["logits", "scores", "depth"] = "logits"
    count = pixel_values.new_zeros((height, width), dtype=torch.float32)
    for top in rows:
        for left in columns:
            place = (..., slice(top, top + crop[0]), slice(left, left + crop[1]))
            values, kind = whole_image_maps(model, pixel_values[place], size_divisor=size_divisor)
            if total is None:
                total = values.new_zeros((*values.shape[:2], height, width))
            total[place] += values
            count[place] += 1
    assert total is not None  # window_starts is never empty
    return DenseMaps(total / count.to(total.device), kind)


def predict_maps(
    model: Model,
    pixel_values: torch.Tensor,
    *,
    crop_size: int | Size | None = None,
    stride: int | Size | None = None,
    size_divisor: int = 1,
) -> DenseMaps:
    """Run a model over whole images, or over windows if ``crop_size`` is given.

    Args:
        model: As in :func:`whole_image_maps`.
        pixel_values: Normalised images ``(B, 3, H, W)``.
        crop_size: As in :func:`sliding_window_maps`; None for whole images.
        stride: As in :func:`sliding_window_maps`; needed with ``crop_size``.
        size_divisor: As in :func:`whole_image_maps`.

    Returns:
        Maps ``(B, C, H, W)``.

    Raises:
        SFAError: If only one of ``crop_size`` and ``stride`` is given, and as the two functions.
    """
    if (crop_size is None) != (stride is None):
        raise SFAError(f"crop_size and stride go together, got {crop_size} and {stride}")
    if crop_size is None or stride is None:
        return whole_image_maps(model, pixel_values, size_divisor=size_divisor)
    return sliding_window_maps(
        model, pixel_values, crop_size=crop_size, stride=stride, size_divisor=size_divisor
    )


def window_starts(length: int, crop: int, stride: int) -> list[int]:
    """Return where windows begin along one side so that they cover all of it.

    Args:
        length: Length of the side in pixels.
        crop: Length of a window.
        stride: Distance between windows.

    Returns:
        First pixels, rising; the last window ends at ``length`` (or begins at 0).
    """
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [min(i * stride, max(length - crop, 0)) for i in range(count)]


def image_size(pixel_values: torch.Tensor) -> Size:
    """Return height and width of images ``(B, 3, H, W)``.

    Raises:
        SFAError: If they have another rank or hold nothing.
    """
    if pixel_values.ndim != 4 or not pixel_values.numel():
        raise SFAError(f"expected images (B, 3, H, W), got {tuple(pixel_values.shape)}")
    return pixel_values.shape[-2], pixel_values.shape[-1]


def _field(outputs: Any, name: str) -> torch.Tensor | None:
    value = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
    return value if isinstance(value, torch.Tensor) else None


def _pair(value: int | Size, what: str) -> Size:
    height, width = (value, value) if isinstance(value, int) else value
    if height < 1 or width < 1:
        raise SFAError(f"{what} must be 1 or more pixels, got {value}")
    return height, width
