# SPDX-License-Identifier: Apache-2.0
"""The same numbers through ``evaluate``, from the class or from its file, without a network."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

evaluate = pytest.importorskip("evaluate")
pytest.importorskip("faster_coco_eval")

from sfa_peft.dense.metrics.coco import CocoMetrics  # noqa: E402
from sfa_peft.dense.metrics.depth import DepthMetrics  # noqa: E402
from sfa_peft.dense.metrics.evaluate_modules import coco_ap, depth, mean_iou  # noqa: E402
from sfa_peft.dense.metrics.segmentation import SegmentationMetrics  # noqa: E402
from sfa_peft.errors import SFAError  # noqa: E402


def make(module: ModuleType, cls: Any, how: str, tmp_path: Path, config: str | None = None) -> Any:
    """The metric, made from its class or loaded from its file."""
    if how == "class":
        return cls(config, cache_dir=str(tmp_path))
    return evaluate.load(str(module.__file__), config, cache_dir=str(tmp_path))


both_ways = pytest.mark.parametrize("how", ["class", "file"])


@both_ways
def test_mean_iou_of_images_of_different_size(how: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sizes = [(4, 5), (3, 2), (4, 5)]
    predicted = [rng.integers(0, 3, size) for size in sizes]
    labels = [np.where(rng.random(size) < 0.2, 255, rng.integers(0, 3, size)) for size in sizes]
    expected = SegmentationMetrics(4, class_names=tuple("abcd"))
    for pair in zip(predicted, labels, strict=True):
        expected.update(*pair)

    metric = make(mean_iou, mean_iou.MeanIoU, how, tmp_path)
    metric.add_batch(predictions=predicted[:2], references=labels[:2])
    metric.add_batch(predictions=predicted[2:], references=labels[2:])
    scores = metric.compute(num_labels=4)

    direct = expected.compute()
    assert scores["mean_iou"] == direct["mean_iou"]
    assert scores["mean_accuracy"] == direct["mean_accuracy"]
    assert scores["overall_accuracy"] == direct["pixel_accuracy"]
    np.testing.assert_array_equal(scores["per_category_iou"], [direct[f"iou_{c}"] for c in "abcd"])
    assert np.isnan(scores["per_category_accuracy"][3])
    filled = metric.compute(predictions=predicted, references=labels, num_labels=4, nan_to_num=0.0)
    assert filled["per_category_iou"][3] == 0.0
    assert filled["mean_iou"] == direct["mean_iou"]


@both_ways
def test_depth_resizes_and_crops_as_the_accumulator(how: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = [rng.uniform(0, 90, size).astype(np.float32) for size in ((40, 60), (32, 64))]
    predicted = [rng.uniform(1, 80, (16, 32)).astype(np.float32) for _ in labels]
    expected = DepthMetrics(80.0, crop="garg")
    expected.update(predicted, labels)

    metric = make(depth, depth.Depth, how, tmp_path)
    scores = metric.compute(predictions=predicted, references=labels, max_depth=80.0, crop="garg")

    assert scores == expected.compute()


@both_ways
@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_coco_ap_of_boxes_and_masks(how: str, kind: Any, tmp_path: Path) -> None:
    boxes = np.array([[0, 0, 4, 4], [2, 2, 6, 5]], np.float64)
    masks = np.zeros((2, 8, 8), np.uint8)
    masks[0, :4, :4] = masks[1, 2:5, 2:6] = 1
    shape = {"bbox": ("boxes", boxes), "segm": ("masks", masks)}[kind]
    truth = {"labels": np.array([0, 1]), shape[0]: shape[1]}
    guess = {"labels": np.array([0, 0]), "scores": np.array([0.25, 0.5]), shape[0]: shape[1]}
    nothing = {"labels": [], shape[0]: []}
    expected = CocoMetrics(("cat", "dog"), iou_types=(kind,))
    expected.update([guess, {**nothing, "scores": []}], [truth, nothing])

    metric = make(coco_ap, coco_ap.CocoAP, how, tmp_path, kind)
    scores = metric.compute(
        predictions=[guess, {**nothing, "scores": []}],
        references=[truth, nothing],
        class_names=["cat", "dog"],
    )

    np.testing.assert_equal(scores, expected.compute())
    assert 0 < scores[f"{kind}_map"] < 1


def test_bad_input_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SFAError, match="configuration must be"):
        coco_ap.CocoAP("boxes", cache_dir=str(tmp_path))
    metric = mean_iou.MeanIoU(cache_dir=str(tmp_path))
    with pytest.raises(SFAError, match="class id 7"):
        metric.compute(predictions=[[[7]]], references=[[[0]]], num_labels=2)
    metric = mean_iou.MeanIoU(cache_dir=str(tmp_path))
    with pytest.raises(SFAError, match="differ in shape"):
        metric.compute(predictions=[[[0, 0]]], references=[[[0]]], num_labels=2)
