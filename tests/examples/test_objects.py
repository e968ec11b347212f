# SPDX-License-Identifier: Apache-2.0
"""Scores of objects are counted in the images' own frame, pictures are drawn in the model's."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sfa_peft.dense import CocoMetrics, ObjectResize, TransformedSplit, collate_instances
from tests.dense.metrics.test_ground_truth import squares

pytest.importorskip("faster_coco_eval")
SIZE = (320, 320)


class FindsTheSecond(torch.nn.Module):
    """A Mask2Former that finds nothing but the second object of the one image there is."""

    device = torch.device("cpu")

    def __init__(self, item: dict[str, Any]) -> None:
        super().__init__()
        self.mask = item["labels"]["masks"][1]

    def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
        assert tuple(pixel_values.shape) == (1, 3, *SIZE)
        classes = torch.tensor([[[-9.0, 9.0, -9.0, -9.0]]])
        logits = 20.0 * self.mask.float()[None, None] - 10
        return SimpleNamespace(class_queries_logits=classes, masks_queries_logits=logits)


def test_scores_are_of_the_images_own_frame_and_pictures_of_the_models() -> None:
    script, objects = map(importlib.import_module, ("instance_segmentation", "common.objects"))
    # Enlarged to 320 x 320, the medium square has 13,000 pixels, more than 96 x 96.
    data = TransformedSplit([squares([31, 60, 97])], ObjectResize(SIZE))
    model, metric = FindsTheSecond(data[0]), CocoMetrics(("a", "b", "c"), iou_types=["segm"])

    scores = objects.evaluate(model, data, metric, collate_instances, script.predict)
    columns = objects.columns_of(model, [data[0]], collate_instances, script.predict)

    assert [scores[f"segm_mar_{size}"] for size in ("small", "large")] == [0, 0]
    assert scores["segm_mar_medium"] > 0.85
    truth, found = columns["truth"][0], columns["prediction"][0]
    assert found.image.shape[:2] == SIZE
    assert found.classes.tolist() == [1]
    np.testing.assert_array_equal(found.masks[0], truth.masks[1])
