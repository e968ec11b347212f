# SPDX-License-Identifier: Apache-2.0
"""Mean IoU and accuracies of semantic segmentation, from a confusion matrix summed over batches.

Numbers follow mmseg: intersections and unions are summed over the whole set, then divided, and a
class that neither the labels nor the predictions hold is nan and left out of the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from sfa_peft.dense.metrics.accumulator import BatchMetric, as_array
from sfa_peft.errors import SFAError


def confusion_matrix(
    predicted: NDArray[Any], labels: NDArray[Any], *, num_classes: int, ignore_index: int = 255
) -> NDArray[np.int64]:
    """Count pixels by true and predicted class.

    Args:
        predicted: Class ids in ``[0, num_classes)``, integers of any shape.
        labels: Class ids in ``[0, num_classes)`` or ``ignore_index``, the same shape.
        num_classes: Number of classes.
        ignore_index: Label of pixels that are not counted.

    Returns:
        Counts, int64 ``(num_classes, num_classes)``, rows are true classes.

    Raises:
        SFAError: If the shapes differ or an id is out of range.
    """
    if predicted.shape != labels.shape:
        raise SFAError(
            f"predictions {predicted.shape} and labels {labels.shape} differ in shape; logits must "
            "go through argmax_logits first (Trainer's preprocess_logits_for_metrics)"
        )
    counted = labels != ignore_index
    true = _in_range(labels[counted], num_classes, f"labels (ignore_index={ignore_index})")
    guess = _in_range(predicted[counted], num_classes, "predictions")
    counts = np.bincount(num_classes * true + guess, minlength=num_classes**2)
    return counts.reshape(num_classes, num_classes)


def segmentation_scores(confusion: NDArray[np.int64]) -> dict[str, Any]:
    """Return the scores of a confusion matrix.

    Args:
        confusion: Counts ``(C, C)``, rows are true classes.

    Returns:
        ``mean_iou``, ``pixel_accuracy`` and ``mean_accuracy``, floats in ``[0, 1]`` or nan where
        nothing was counted, and ``iou`` and ``accuracy``, float64 ``(C,)``, nan for absent classes.
    """
    hits = np.diag(confusion).astype(np.float64)
    true, guessed = confusion.sum(1), confusion.sum(0)
    iou = _ratio(hits, true + guessed - hits)
    accuracy = _ratio(hits, true)
    return {
        "mean_iou": _mean(iou),
        "pixel_accuracy": float(_ratio(hits.sum(), true.sum())),
        "mean_accuracy": _mean(accuracy),
        "iou": iou,
        "accuracy": accuracy,
    }


class SegmentationMetrics(BatchMetric):
    """Accumulate a confusion matrix over batches; give it to Trainer as ``compute_metrics``.

    Set ``batch_eval_metrics=True`` in the arguments and pass :func:`argmax_logits` as
    ``preprocess_logits_for_metrics``: then neither logits nor masks of the whole set are kept.

    Args:
        num_classes: Number of classes, 1 or more.
        class_names: One name per class; adds ``iou_<name>`` to the scores.
        ignore_index: Label of pixels that are not counted.

    Raises:
        SFAError: If ``num_classes`` is below 1 or the number of names is another.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        class_names: Sequence[str] | None = None,
        ignore_index: int = 255,
    ) -> None:
        if num_classes < 1:
            raise SFAError(f"num_classes must be 1 or more, got {num_classes}")
        if class_names is not None and len(class_names) != num_classes:
            raise SFAError(f"{len(class_names)} class names for {num_classes} classes")
        self.num_classes = num_classes
        self.class_names = tuple(class_names) if class_names is not None else None
        self.ignore_index = ignore_index
        self.reset()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.confusion = np.zeros((self.num_classes, self.num_classes), np.int64)

    def update(self, predicted: Any, labels: Any) -> None:
        """Count one batch.

        Args:
            predicted: Class ids, integer array or tensor ``(B, H, W)`` on any device; or, of images
                of several sizes, a list of ``(H, W)``.
            labels: Class ids or ``ignore_index``, the same shape or shapes.

        Raises:
            SFAError: If the shapes differ or an id is out of range.
        """
        counts = np.zeros_like(self.confusion)
        for guess, true in _maps(predicted, labels):
            counts += confusion_matrix(
                as_array(guess),
                as_array(true),
                num_classes=self.num_classes,
                ignore_index=self.ignore_index,
            )
        self.confusion += counts  # only now: a bad batch must not be half counted

    def compute(self) -> dict[str, float]:
        """Return the scores of everything counted since the last reset.

        Returns:
            ``mean_iou``, ``pixel_accuracy``, ``mean_accuracy``, and ``iou_<name>`` per named class;
            in ``[0, 1]``, nan for what was never seen.
        """
        scores = segmentation_scores(self.confusion)
        result = {key: scores[key] for key in ("mean_iou", "pixel_accuracy", "mean_accuracy")}
        for name, iou in zip(self.class_names or (), scores["iou"], strict=False):
            result[f"iou_{name}"] = float(iou)
        return result


def argmax_logits(
    logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor
) -> torch.Tensor:
    """Turn logits into class ids at the labels' size, as ``preprocess_logits_for_metrics``.

    Args:
        logits: Float ``(B, C, h, w)``, or a tuple whose first element that is.
        labels: Class ids ``(B, H, W)``; only the size is used.

    Returns:
        Class ids, int64 ``(B, H, W)``, on the logits' device. Logits of another size are resized
        bilinearly first, as mmseg does.
    """
    first = logits[0] if isinstance(logits, tuple) else logits
    if first.shape[-2:] != labels.shape[-2:]:
        first = functional.interpolate(
            first.float(), size=labels.shape[-2:], mode="bilinear", align_corners=False
        )
    return first.argmax(1)


def _maps(predicted: Any, labels: Any) -> list[tuple[Any, Any]]:
    """Return pairs of class maps: one of whole batches, or one per image."""
    if not isinstance(predicted, (list, tuple)):
        return [(predicted, labels)]
    if len(predicted) != len(labels):
        raise SFAError(f"{len(predicted)} predicted class maps for {len(labels)} labels")
    return list(zip(predicted, labels, strict=True))


def _in_range(ids: NDArray[Any], num_classes: int, what: str) -> NDArray[np.int64]:
    if ids.dtype.kind not in "biu":
        raise SFAError(f"{what}: expected integer class ids, got {ids.dtype}")
    ids = ids.astype(np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= num_classes):
        wrong = ids.min() if ids.min() < 0 else ids.max()
        raise SFAError(
            f"{what} hold class id {wrong}, but there are {num_classes} classes (0 to "
            f"{num_classes - 1}); check num_classes and which id means 'not labelled'"
        )
    return ids


def _ratio(part: Any, whole: Any) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.float64(part) / np.float64(whole)


def _mean(values: NDArray[np.float64]) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else float("nan")
