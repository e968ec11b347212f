# SPDX-License-Identifier: Apache-2.0
"""Ground truth goes back to the frame of the image before it was resized."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfa_peft.dense.data.collate import collate_detection, collate_instances
from sfa_peft.dense.data.object_transforms import ObjectResize
from sfa_peft.dense.data.objects import Objects
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.metrics.detr import detr_results
from sfa_peft.dense.metrics.ground_truth import true_objects
from sfa_peft.errors import SFAError
from tests.model_zoo import require

pytest.importorskip("faster_coco_eval")


def squares(sides: list[int], height: int = 123, width: int = 201) -> tuple[Image.Image, Objects]:
    """An image and squares of some sides, each with its top left corner at (3, 7)."""
    masks = np.zeros((len(sides), height, width), bool)
    for mask, side in zip(masks, sides, strict=True):
        mask[7 : 7 + side, 3 : 3 + side] = True
    boxes = np.array([[3, 7, 3 + side, 7 + side] for side in sides], np.float32)
    classes = np.arange(len(sides))
    return Image.new("RGB", (width, height)), Objects(boxes, classes, masks)


@pytest.mark.parametrize("size", [(64, 64), (300, 210), (123, 201)])
def test_what_resizing_for_evaluation_keeps_comes_back_to_the_bit(size: tuple[int, int]) -> None:
    image, objects = squares([31, 32, 33, 96])

    item = ObjectResize(size)(image, objects)
    truth = true_objects(item["labels"])

    assert tuple(item["pixel_values"].shape[1:]) == size
    assert tuple(item["labels"]["masks"].shape[1:]) == size
    np.testing.assert_array_equal(truth["boxes"], objects.boxes)
    np.testing.assert_array_equal(truth["area"], objects.areas)
    np.testing.assert_array_equal(truth["masks"], objects.masks)
    np.testing.assert_array_equal(truth["labels"], objects.classes)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("size", [(64, 64), (800, 800)])
def test_small_medium_and_large_are_those_of_the_image_not_of_the_models_input(
    size: tuple[int, int], kind: Any
) -> None:
    image, objects = squares([31, 60, 97])
    truth = true_objects(ObjectResize(size)(image, objects)["labels"])
    # Only the medium one is found.
    guess = {name: truth[name][1:2] for name in ("labels", "boxes", "masks")}

    metric = CocoMetrics(("a", "b", "c"), iou_types=(kind,))
    metric.update([{**guess, "scores": [0.9]}], [truth])

    scores = metric.compute()
    by_size = [scores[f"{kind}_mar_{name}"] for name in ("small", "medium", "large")]
    assert by_size == [0, 1, 0]


def test_labels_of_a_processor_are_scaled_back() -> None:
    labels = {
        "class_labels": torch.tensor([1]),
        "boxes": torch.tensor([[0.25, 0.5, 0.5, 0.25]]),
        "area": torch.tensor([50.0 * 20]),
        "size": torch.tensor([80, 100]),
        "orig_size": torch.tensor([40, 200]),
        "masks": torch.zeros(1, 80, 100),
    }

    truth = true_objects(labels)

    assert truth["boxes"].tolist() == [[0, 15, 100, 25]]
    assert truth["area"].tolist() == [1000.0]
    assert set(truth) == {"labels", "boxes", "area"}  # masks of another size are left out
    assert true_objects({**labels, "masks": torch.zeros(1, 40, 200)})["masks"].shape[-1] == 200
    del labels["size"]
    assert "area" not in true_objects(labels)
    del labels["orig_size"]
    with pytest.raises(SFAError, match="without 'orig_size'"):
        true_objects(labels)


def test_a_detector_in_trainer_is_counted_by_the_annotated_areas() -> None:
    image, objects = squares([110])
    few = np.array([900.0], np.float32)  # the annotated area: a thin thing in a wide box
    thin = Objects(objects.boxes, objects.classes, objects.masks, few)
    batch = collate_detection([ObjectResize((640, 640))(image, thin)])
    logits, boxes = torch.full((1, 1, 2), -9.0), batch["labels"][0]["boxes"][None]
    logits[0, 0, 0] = 5
    convert = detr_results(require("RTDetrImageProcessor")())

    metric = CocoMetrics(("a", "b"), convert=convert)
    scores = metric(SimpleNamespace(predictions=(logits, boxes), inputs=batch))

    assert scores["bbox_map_small"] == pytest.approx(1.0)
    assert np.isnan(scores["bbox_map_large"])


def test_batches_carry_masks_of_the_models_input_alone() -> None:
    items = [ObjectResize((64, 64))(*squares([31]))]

    assert "orig_masks" not in collate_detection(items)["labels"][0]
    batch = collate_instances(items)
    assert set(batch) == {"pixel_values", "pixel_mask", "mask_labels", "class_labels"}
    assert tuple(batch["mask_labels"][0].shape) == (1, 64, 64)
