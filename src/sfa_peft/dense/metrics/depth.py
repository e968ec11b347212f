# SPDX-License-Identifier: Apache-2.0
"""Errors of metric depth as GLPDepth and MIM-Depth report them: the mean of per-image values.

Every image counts the same, however many of its pixels have a label. An image without any is
left out and counted in ``skipped_images``; a prediction that is not finite is an error.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sfa_peft.dense.metrics.accumulator import BatchMetric, as_array
from sfa_peft.errors import SFAError

SCORE_NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3")
Crop = Literal["nyu_eigen", "garg", "eigen"]

KB_SIZE = (352, 1216)
NYU_SIZE = (480, 640)
NYU_EIGEN = (45, 471, 41, 601)  # top, bottom, left, right in pixels of NYU_SIZE
# top, bottom, left, right as shares of height and width
SHARES: dict[str, tuple[float, float, float, float]] = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
}


def depth_scores(predicted: NDArray[Any], target: NDArray[Any]) -> dict[str, float]:
    """Compare the depths of the counted pixels of one image.

    Args:
        predicted: Positive depths ``(N,)`` in metres, N at least 1.
        target: True depths ``(N,)``, positive.

    Returns:
        ``abs_rel``, ``sq_rel`` (metres), ``rmse`` (metres), ``rmse_log``, ``log10``, ``silog``
        (variance weight 0.5, not times 100), and ``d1``, ``d2``, ``d3``: shares in ``[0, 1]``.

    Raises:
        SFAError: If the shapes differ, there is no pixel, or a depth is not positive and finite.
    """
    predicted, target = np.asarray(predicted, np.float64), np.asarray(target, np.float64)
    if predicted.shape != target.shape or predicted.ndim != 1 or not predicted.size:
        raise SFAError(
            f"expected as many predicted as true depths, one at least, got {predicted.shape} and "
            f"{target.shape}"
        )
    for depths, what in ((predicted, "predicted"), (target, "true")):
        if not (np.isfinite(depths).all() and (depths > 0).all()):
            raise SFAError(f"{what} depths must be finite and above 0: logarithms are taken")
    difference = predicted - target
    log_difference = np.log(predicted) - np.log(target)
    ratio = np.maximum(predicted / target, target / predicted)
    squared_log = float(np.mean(log_difference**2))
    return {
        "abs_rel": float(np.mean(np.abs(difference) / target)),
        "sq_rel": float(np.mean(difference**2 / target)),
        "rmse": math.sqrt(np.mean(difference**2)),
        "rmse_log": math.sqrt(squared_log),
        "log10": float(np.mean(np.abs(np.log10(predicted) - np.log10(target)))),
        "silog": math.sqrt(squared_log - 0.5 * float(np.mean(log_difference)) ** 2),
        "d1": float(np.mean(ratio < 1.25)),
        "d2": float(np.mean(ratio < 1.25**2)),
        "d3": float(np.mean(ratio < 1.25**3)),
    }


def kb_crop(values: Any) -> Any:
    """Cut the bottom middle 352 x 1216 out of KITTI images or depths, as the KITTI benchmark does.

    Args:
        values: Array or tensor ``(..., H, W)``, at least 352 x 1216.

    Returns:
        A view ``(..., 352, 1216)``.

    Raises:
        SFAError: If the image is smaller.
    """
    (height, width), (rows, columns) = values.shape[-2:], KB_SIZE
    if height < rows or width < columns:
        raise SFAError(f"the KITTI benchmark crop takes {rows}x{columns} of {height}x{width}")
    top, left = height - rows, (width - columns) // 2
    return values[..., top : top + rows, left : left + columns]


def evaluation_mask(size: tuple[int, int], crop: Crop | None) -> NDArray[np.bool_]:
    """Mark the pixels that an evaluation protocol counts.

    Args:
        size: Height and width of the labels.
        crop: ``"nyu_eigen"`` (labels of 480 x 640), ``"garg"`` or ``"eigen"`` (KITTI), or None
            for every pixel.

    Returns:
        Bool ``(H, W)``.

    Raises:
        SFAError: If the crop is unknown, or it is NYU's and the size another.
    """
    height, width = size
    if crop is None:
        return np.ones(size, np.bool_)
    if crop == "nyu_eigen":
        if (height, width) != NYU_SIZE:
            raise SFAError(
                f"the Eigen crop of NYUv2 is given in pixels of 480x640 labels, got "
                f"{height}x{width}; evaluate at full size or use crop=None"
            )
        top, bottom, left, right = NYU_EIGEN
    elif crop in SHARES:
        shares = SHARES[crop]
        top, bottom = int(shares[0] * height), int(shares[1] * height)
        left, right = int(shares[2] * width), int(shares[3] * width)
    else:
        raise SFAError(f"crop must be None, 'nyu_eigen', 'garg' or 'eigen', got {crop!r}")
    mask = np.zeros(size, np.bool_)
    mask[top:bottom, left:right] = True
    return mask


class DepthMetrics(BatchMetric):
    """Mean over images of the usual depth errors; give it to Trainer as ``compute_metrics``.

    Set ``batch_eval_metrics=True`` in the arguments and pass :func:`depth_at_labels` as
    ``preprocess_logits_for_metrics``. Pixels count whose label lies strictly between ``min_depth``
    and ``max_depth`` and inside the crop. Predictions of another size are resized bilinearly to
    the labels' and then clamped to ``[min_depth, max_depth]``.

    Args:
        max_depth: Upper end of the range in metres.
        min_depth: Lower end of the range in metres, above 0.
        crop: As in :func:`evaluation_mask`.
        kb_crop: Whether to take :func:`kb_crop` of labels and predictions first.

    Raises:
        SFAError: If the range is empty or the crop unknown.
    """

    def __init__(
        self,
        max_depth: float,
        *,
        min_depth: float = 1e-3,
        crop: Crop | None = None,
        kb_crop: bool = False,
    ) -> None:
        if not 0 < min_depth < max_depth < math.inf:
            raise SFAError(
                f"depths must satisfy 0 < min_depth < max_depth, got {min_depth} and {max_depth}"
            )
        evaluation_mask(NYU_SIZE, crop)  # an unknown name fails now, not after an epoch
        self.max_depth = max_depth
        self.min_depth = min_depth
        self.crop: Crop | None = crop
        self.kb_crop = kb_crop
        self.reset()

    @classmethod
    def nyu(cls) -> DepthMetrics:
        """Return the metric of NYUv2: depths of 1 mm to 10 m, Eigen crop of 480 x 640."""
        return cls(10.0, crop="nyu_eigen")

    @classmethod
    def kitti(cls) -> DepthMetrics:
        """Return the metric of KITTI: 1 mm to 80 m, benchmark crop, then Garg crop."""
        return cls(80.0, crop="garg", kb_crop=True)

    def reset(self) -> None:
        """Forget every image."""
        self._rows: list[tuple[float, ...]] = []
        self.skipped_images = 0

    def update(self, predicted: Any, labels: Any) -> None:
        """Count a batch of images.

        Args:
            predicted: Depths in metres, float ``(B, h, w)`` or ``(B, 1, h, w)``, or a list of B
                arrays or tensors ``(h, w)``, on any device.
            labels: True depths in metres, float ``(B, H, W)`` or ``(B, 1, H, W)`` or a list. What
                is not in the range, such as 0, nan and inf, is not labelled.

        Raises:
            SFAError: If the numbers of images differ, a shape or dtype is wrong, a size does not
                fit the crop, or a prediction is not finite where it counts.
        """
        predictions = _images(predicted, "predictions")
        targets = _images(labels, "labels")
        if len(predictions) != len(targets):
            raise SFAError(
                f"{len(predictions)} predicted depth maps for {len(targets)} labels; a model with "
                "several outputs needs depth_at_labels (Trainer's preprocess_logits_for_metrics)"
            )
        rows: list[tuple[float, ...] | None] = [
            self._row(*pair) for pair in zip(predictions, targets, strict=True)
        ]
        # Only now: a batch with a bad image must not be half counted.
        self._rows += [row for row in rows if row is not None]
        self.skipped_images += rows.count(None)

    def compute(self) -> dict[str, float]:
        """Return the mean scores of the images counted since the last reset.

        Returns:
            The scores of :func:`depth_scores` (nan if no image counted), ``images``, the number
            that counted, and ``skipped_images``, the number without a labelled pixel.
        """
        count = len(self._rows)
        columns = zip(*self._rows, strict=True) if count else [()] * len(SCORE_NAMES)
        # fsum is exact, so the order of the images does not show.
        scores = {
            name: math.fsum(column) / count if count else math.nan
            for name, column in zip(SCORE_NAMES, columns, strict=True)
        }
        return {**scores, "images": count, "skipped_images": self.skipped_images}

    def _row(self, predicted: torch.Tensor, target: torch.Tensor) -> tuple[float, ...] | None:
        """Return the scores of one image, or None if it has no labelled pixel."""
        if self.kb_crop:
            if predicted.shape == KB_SIZE and target.shape != KB_SIZE:
                raise SFAError(
                    f"the prediction has the size of the KITTI benchmark crop, 352x1216, but the "
                    f"label is {target.shape[0]}x{target.shape[1]}: of the crop or of the whole "
                    "image? Crop the labels too (kb_crop), or resize the prediction to the whole"
                )
            predicted, target = kb_crop(_resized(predicted, target)), kb_crop(target)
        else:
            predicted = _resized(predicted, target)
        depths, estimates = as_array(target), as_array(predicted)
        counted = evaluation_mask((depths.shape[0], depths.shape[1]), self.crop)
        counted &= (depths > self.min_depth) & (depths < self.max_depth)
        if not counted.any():
            return None
        estimates = estimates[counted]
        wrong = int((~np.isfinite(estimates)).sum())
        if wrong:
            raise SFAError(
                f"{wrong} of {estimates.size} predicted depths that count are not finite; the "
                "model has diverged or overflowed"
            )
        scores = depth_scores(np.clip(estimates, self.min_depth, self.max_depth), depths[counted])
        return tuple(scores[name] for name in SCORE_NAMES)


def depth_at_labels(
    predicted: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> torch.Tensor:
    """Take the depth out of a model's outputs and resize it to the labels' size.

    Give it to Trainer as ``preprocess_logits_for_metrics``.

    Args:
        predicted: Depths ``(B, h, w)`` or ``(B, 1, h, w)``, or a tuple that begins with them.
        labels: True depths ``(B, H, W)`` or ``(B, 1, H, W)``; only the size is used.

    Returns:
        Depths, float32 ``(B, H, W)``, on the predictions' device, resized bilinearly.
    """
    first = predicted[0] if isinstance(predicted, tuple) else predicted
    first = first.float() if first.ndim == 4 else first.float()[:, None]
    if first.shape[-2:] != labels.shape[-2:]:
        first = functional.interpolate(
            first, size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
    return first[:, 0]


def _resized(predicted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return depth_at_labels(predicted[None], target[None])[0]


def _images(batch: Any, what: str) -> list[torch.Tensor]:
    """Split a batch into float32 depth maps ``(H, W)``."""
    items: Any = batch if isinstance(batch, (list, tuple)) else as_array(batch)
    if not isinstance(items, (list, tuple)) and items.ndim not in (3, 4):
        raise SFAError(f"{what}: expected a batch of depth maps (B, H, W), got {items.shape}")
    maps = []
    for item in items:
        depths = as_array(item)
        depths = depths[0] if depths.ndim == 3 and depths.shape[0] == 1 else depths
        if depths.ndim != 2 or not depths.size:
            raise SFAError(f"{what}: expected depth maps (H, W), got one of shape {depths.shape}")
        if depths.dtype.kind != "f":
            raise SFAError(
                f"{what}: expected depths in metres as floats, got {depths.dtype}; stored integers "
                "are divided first, by 1000 for NYUv2 or 256 for KITTI"
            )
        maps.append(torch.from_numpy(np.ascontiguousarray(depths, np.float32)))
    return maps
