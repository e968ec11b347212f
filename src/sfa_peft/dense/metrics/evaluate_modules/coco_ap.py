# SPDX-License-Identifier: Apache-2.0
"""COCO average precision as an ``evaluate.Metric``: configuration ``bbox`` or ``segm``."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate

from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.errors import SFAError

_DESCRIPTION = "COCO average precision and recall of boxes (config bbox) or masks (config segm)."
_INPUTS = """
Args:
    predictions: Per image a dict with scores, labels and boxes (left, top, right, bottom in
        pixels), or masks (N, H, W) of 0 and 1 with the configuration segm.
    references: Per image a dict with labels and boxes or masks.
    class_names: Name of class id 0, 1, ...
Returns:
    The scores of sfa_peft.dense.CocoMetrics: bbox_map, bbox_map_50, ... or segm_map, ...
"""
_KINDS = {"default": "bbox", "bbox": "bbox", "segm": "segm"}


class CocoAP(evaluate.Metric):
    """The scores of :class:`~sfa_peft.dense.metrics.coco.CocoMetrics`."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in _KINDS:
            raise SFAError(f"configuration must be 'bbox' or 'segm', got {self.config_name!r}")
        if _KINDS[self.config_name] == "bbox":
            shape = {"boxes": datasets.Sequence(_sequence("float64"))}
        else:
            shape = {"masks": datasets.Sequence(datasets.Sequence(_sequence("uint8")))}
        truth = {"labels": _sequence("int64"), **shape}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": {"scores": _sequence("float64"), **truth}, "references": truth}
            ),
        )

    def _compute(
        self, predictions: Any, references: Any, class_names: list[str]
    ) -> dict[str, float]:
        kind: Any = _KINDS[self.config_name]
        metric = CocoMetrics(class_names, iou_types=(kind,))
        metric.update(list(predictions), list(references))
        return metric.compute()


def _sequence(dtype: str) -> Any:
    return datasets.Sequence(datasets.Value(dtype))
