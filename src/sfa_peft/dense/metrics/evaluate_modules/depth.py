# SPDX-License-Identifier: Apache-2.0
"""Depth errors of NYUv2 and KITTI as an ``evaluate.Metric``."""

from __future__ import annotations

from typing import Any

import datasets
import evaluate
import numpy as np

from sfa_peft.dense.metrics.depth import DepthMetrics

_DESCRIPTION = "Depth errors as GLPDepth and MIM-Depth report them: means of per-image values."
_INPUTS = """
Args:
    predictions: Depths in metres, float (h, w) per image; resized to the reference.
    references: Depths in metres, float (H, W) per image; 0 where there is no label.
    max_depth, min_depth, crop, kb_crop: As for sfa_peft.dense.DepthMetrics. NYUv2: max_depth=10,
        crop="nyu_eigen"; KITTI: max_depth=80, crop="garg", kb_crop=True.
Returns:
    abs_rel, sq_rel, rmse, rmse_log, log10, silog, d1, d2, d3, images, skipped_images.
"""


class Depth(evaluate.Metric):
    """The scores of :class:`~sfa_peft.dense.metrics.depth.DepthMetrics`."""

    def _info(self) -> evaluate.MetricInfo:
        image = datasets.Sequence(datasets.Sequence(datasets.Value("float32")))
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
        max_depth: float,
        min_depth: float = 1e-3,
        crop: Any = None,
        kb_crop: bool = False,
    ) -> dict[str, float]:
        metric = DepthMetrics(max_depth, min_depth=min_depth, crop=crop, kb_crop=kb_crop)
        metric.update(
            [np.asarray(image, np.float32) for image in predictions],
            [np.asarray(image, np.float32) for image in references],
        )
        return metric.compute()
