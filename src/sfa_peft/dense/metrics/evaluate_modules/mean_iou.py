# SPDX-License-Identifier: Apache-2.0
"""``evaluate.load("mean_iou")`` without the Hub: same inputs, same names of scores."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from sfa_peft.dense.metrics.segmentation import SegmentationMetrics, segmentation_scores
from sfa_peft.errors import SFAError

_DESCRIPTION = "Mean IoU and accuracies over one confusion matrix of the whole set, as mmseg."
_INPUTS = """
Args:
    predictions: Class ids, one (H, W) per image; sizes may differ.
    references: Class ids or ignore_index, likewise.
    num_labels: Number of classes.
    ignore_index: Label of pixels that do not count.
    nan_to_num: What to write for classes that occur nowhere, instead of nan; means leave them out
        either way.
Returns:
    mean_iou, mean_accuracy, overall_accuracy, per_category_iou, per_category_accuracy.
"""


class MeanIoU(evaluate.Metric):
    """mIoU, mAcc and aAcc with the interface of ``evaluate``'s own ``mean_iou``."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Sequence(datasets.Sequence(datasets.Value("int32")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": image, "references": image}),
        )

    def _compute(
        self,
        predictions: Any,
        references: Any,
        num_labels: int,
        ignore_index: int = 255,
        nan_to_num: float | None = None,
    ) -> dict[str, Any]:
        metric = SegmentationMetrics(num_labels, ignore_index=ignore_index)
        if len(predictions) != len(references):
            raise SFAError(f"{len(predictions)} predictions for {len(references)} references")
        for predicted, labels in zip(predictions, references, strict=True):
            metric.update(np.asarray(predicted), np.asarray(labels))
        scores = segmentation_scores(metric.confusion)
        per_class = {
            "per_category_iou": scores["iou"],
            "per_category_accuracy": scores["accuracy"],
        }
        if nan_to_num is not None:
            per_class = {key: np.nan_to_num(row, nan=nan_to_num) for key, row in per_class.items()}
        return {
            "mean_iou": scores["mean_iou"],
            "mean_accuracy": scores["mean_accuracy"],
            "overall_accuracy": scores["pixel_accuracy"],
            **per_class,
        }
