# SPDX-License-Identifier: Apache-2.0
"""Objects in every form in which they come, and what is wrong with those that do not fit."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.errors import SFAError

faster_coco_eval = pytest.importorskip("faster_coco_eval")

NAMES = ("cat", "dog")


def test_masks_may_come_run_length_encoded() -> None:
    masks = np.zeros((2, 24, 20), bool)
    masks[0, :10, :10] = masks[1, 5:20, 5:9] = True
    truth = {"labels": np.array([0, 1]), "masks": masks}
    columns = np.asfortranarray(truth["masks"].astype(np.uint8).transpose(1, 2, 0))
    encoded = {**truth, "masks": faster_coco_eval.mask.encode(columns)}

    metric = CocoMetrics(NAMES, iou_types=("segm",))
    metric.update([{**truth, "scores": np.ones(2)}], [encoded])

    assert metric.compute()["segm_map"] == pytest.approx(1.0)


BOX = [[0.0, 0.0, 10.0, 10.0]]


@pytest.mark.parametrize(
    ("guess", "truth", "message"),
    [
        ({"labels": [2]}, {}, "predictions of image 0: class id 2, but there are 2 classes"),
        ({}, {"labels": [-1]}, "labels of image 0: class id -1"),
        ({"labels": [0.5]}, {}, "labels must be integers"),
        ({"scores": [math.nan]}, {}, "scores hold a value that is not finite"),
        ({"scores": [0.5, 0.5]}, {}, "2 scores for 1 labels"),
        ({"scores": None}, {}, "no 'scores'"),
        ({}, {"boxes": None}, "no 'boxes'"),
        ({"boxes": [[5, 5, 1, 9]]}, {}, "ends before it begins"),
        ({"boxes": [[0, 0, math.inf, 9]]}, {}, "not finite"),
        ({"boxes": [[0, 0, 1, 1]] * 2}, {}, r"boxes of shape \(2, 4\) for 1 labels"),
        ({}, {"boxes": [[0.1, 0.1, 0.9, 1.0]]}, "multiply by the image size"),
        ({"masks": np.full((1, 4, 4), 0.5)}, {}, "threshold them"),
        ({"masks": np.ones((4, 4))}, {}, r"expected masks \(N, H, W\)"),
        ({"masks": np.ones((2, 4, 4))}, {}, "2 masks for 1 labels"),
        ({"masks": np.ones((1, 8, 8))}, {}, "masks differ in size"),
        ({}, {"iscrowd": [0, 1]}, "2 iscrowd for 1 labels"),
    ],
)
def test_malformed_objects_are_refused_and_the_batch_not_counted(
    guess: dict[str, Any], truth: dict[str, Any], message: str
) -> None:
    good = {"boxes": BOX, "labels": [0], "masks": np.ones((1, 4, 4), bool)}
    fine = ({**good, "scores": [0.5]}, good)
    metric = CocoMetrics(NAMES, iou_types=("bbox", "segm"))

    with pytest.raises(SFAError, match=message):
        metric.update([{**fine[0], **guess}], [{**good, **truth}])

    assert metric.compute()["images"] == 0
    metric.update(*zip(fine, strict=False))
    assert metric.compute()["images"] == 1
