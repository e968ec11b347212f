# SPDX-License-Identifier: Apache-2.0
"""Metrics against a loop over pixels, over batches, and on bad input."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sfa_peft.dense.metrics.segmentation import (
    SegmentationMetrics,
    argmax_logits,
    confusion_matrix,
    segmentation_scores,
)
from sfa_peft.errors import SFAError

CLASSES = 4


def reference_iou(predicted: np.ndarray, labels: np.ndarray, ignore: int) -> list[float]:
    ious = []
    pairs = [(p, t) for p, t in zip(predicted.flat, labels.flat, strict=True) if t != ignore]
    for c in range(CLASSES):
        both = sum(p == c and t == c for p, t in pairs)
        either = sum(p == c or t == c for p, t in pairs)
        ious.append(both / either if either else math.nan)
    return ious


def reference_accuracy(predicted: np.ndarray, labels: np.ndarray) -> list[float]:
    pairs = list(zip(predicted.flat, labels.flat, strict=True))
    hits = [[p == t for p, t in pairs if t == c] for c in range(CLASSES)]
    return [sum(row) / len(row) if row else math.nan for row in hits]


@st.composite
def masks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5))
    predicted = draw(hnp.arrays(np.int64, shape, elements=st.integers(0, CLASSES - 1)))
    label = st.one_of(st.integers(0, CLASSES - 1), st.just(255))
    return predicted, draw(hnp.arrays(np.uint8, shape, elements=label))


@given(masks())
def test_scores_equal_those_of_a_loop_over_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, labels = pair
    confusion = confusion_matrix(predicted, labels, num_classes=CLASSES)
    scores = segmentation_scores(confusion)
    expected = np.array(reference_iou(predicted, labels, 255))
    counted = labels != 255

    np.testing.assert_array_equal(scores["iou"], expected)
    accuracy = np.array(reference_accuracy(predicted, labels))
    np.testing.assert_array_equal(scores["accuracy"], accuracy)
    assert confusion.sum() == counted.sum()
    if counted.any():
        assert scores["mean_iou"] == pytest.approx(np.nanmean(expected), abs=1e-12)
        assert scores["mean_accuracy"] == pytest.approx(np.nanmean(accuracy), abs=1e-12)
        right = (predicted == labels)[counted].mean()
        assert scores["pixel_accuracy"] == pytest.approx(right, abs=1e-12)
    else:
        assert math.isnan(scores["mean_iou"])
        assert math.isnan(scores["pixel_accuracy"])


@given(masks(), st.integers(0, 5))
def test_batches_add_up_to_the_whole(pair: tuple[np.ndarray, np.ndarray], cut: int) -> None:
    predicted, labels = pair
    whole, parts = SegmentationMetrics(CLASSES), SegmentationMetrics(CLASSES)

    whole.update(predicted, labels)
    for part in (slice(None, cut), slice(cut, None)):
        parts.update(torch.from_numpy(predicted[part]), torch.from_numpy(labels[part]))

    np.testing.assert_array_equal(whole.confusion, parts.confusion)


def _official_scores(
    logits: list[torch.Tensor], labels: list[torch.Tensor]
) -> tuple[float, float, float]:
    """Return mIoU, aAcc and mAcc by mmseg's formulas: postprocess_result and IoUMetric."""
    intersect, union, label_area = torch.zeros(3, CLASSES, dtype=torch.float64)
    for map_, label in zip(logits, labels, strict=True):
        resized = torch.nn.functional.interpolate(
            map_[None], size=tuple(label.shape), mode="bilinear", align_corners=False
        )[0]
        guess = resized.argmax(dim=0)
        guess, true = guess[label != 255], label[label != 255]
        hit, guessed, there = (
            torch.histc(ids.float(), bins=CLASSES, min=0, max=CLASSES - 1)
            for ids in (guess[guess == true], guess, true)
        )
        intersect += hit
        union += guessed + there - hit
        label_area += there
    return (
        np.nanmean((intersect / union).numpy()).item(),
        (intersect.sum() / label_area.sum()).item(),
        np.nanmean((intersect / label_area).numpy()).item(),
    )


def test_scores_at_the_size_of_each_label_are_those_of_mmseg() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, labels = [], []
    for small, full in (((4, 6), (31, 47)), ((8, 8), (64, 64)), ((9, 3), (20, 7))):
        logits.append(torch.randn(CLASSES, *small, generator=generator))
        label = torch.randint(0, CLASSES, full, generator=generator)
        label[torch.rand(full, generator=generator) < 0.2] = 255
        labels.append(label)
    one_by_one, at_once = SegmentationMetrics(CLASSES), SegmentationMetrics(CLASSES)

    guesses = [
        argmax_logits(maps[None], label[None])[0]
        for maps, label in zip(logits, labels, strict=True)
    ]
    for guess, label in zip(guesses, labels, strict=True):
        one_by_one.update(guess[None], label[None])
    at_once.update(guesses, labels)

    scores = one_by_one.compute()
    assert scores == at_once.compute()
    found = [scores[key] for key in ("mean_iou", "pixel_accuracy", "mean_accuracy")]
    assert found == pytest.approx(_official_scores(logits, labels), rel=1e-7)


def test_lists_of_several_lengths_are_refused_and_a_bad_batch_counts_nothing() -> None:
    metric = SegmentationMetrics(CLASSES)
    good, bad = np.zeros((2, 3), np.int64), np.full((4, 5), CLASSES)

    with pytest.raises(SFAError, match="2 predicted class maps for 1 labels"):
        metric.update([good, good], [good])
    with pytest.raises(SFAError, match="predictions hold class id"):
        metric.update([good, bad], [good, np.zeros((4, 5), np.int64)])
    assert metric.confusion.sum() == 0


def test_confusion_rows_are_the_true_classes() -> None:
    confusion = confusion_matrix(np.array([1, 1, 0]), np.array([0, 0, 0]), num_classes=2)

    np.testing.assert_array_equal(confusion, [[1, 2], [0, 0]])


def test_a_class_that_is_only_predicted_counts_as_zero_and_an_absent_one_not_at_all() -> None:
    metrics = SegmentationMetrics(3, class_names=("sky", "road", "car"))
    metrics.update(np.array([[0, 1]]), np.array([[0, 0]]))

    scores = metrics.compute()

    assert scores["iou_sky"] == 0.5
    assert scores["iou_road"] == 0.0
    assert math.isnan(scores["iou_car"])
    assert scores["mean_iou"] == 0.25
    assert scores["mean_accuracy"] == 0.5  # Accuracy of road is nan: there is none.


def test_scores_come_with_the_last_batch_and_counting_starts_over() -> None:
    metrics = SegmentationMetrics(2)
    right = SimpleNamespace(predictions=np.array([[0, 1]]), label_ids=np.array([[0, 1]]))
    wrong = SimpleNamespace(predictions=np.array([[1, 0]]), label_ids=np.array([[0, 1]]))

    assert metrics(wrong, compute_result=False) == {}
    assert metrics(right, compute_result=True)["pixel_accuracy"] == 0.5
    assert metrics(right)["pixel_accuracy"] == 1.0


def test_another_ignore_index_is_left_out() -> None:
    metrics = SegmentationMetrics(11, ignore_index=11)

    metrics.update(np.array([[3, 4]]), np.array([[3, 11]]))

    assert metrics.compute()["pixel_accuracy"] == 1.0


@pytest.mark.parametrize("wrong", [-1, 4, 254])
def test_a_label_out_of_range_is_named(wrong: int) -> None:
    with pytest.raises(SFAError, match=rf"labels .* class id {wrong}, but there are 4 classes"):
        SegmentationMetrics(4).update(np.array([[0, 0]]), np.array([[wrong, 1]]))


def test_a_prediction_out_of_range_is_named() -> None:
    with pytest.raises(SFAError, match="predictions hold class id 7"):
        SegmentationMetrics(4).update(np.array([[7]]), np.array([[0]]))


def test_logits_in_place_of_ids_are_refused_with_the_remedy() -> None:
    with pytest.raises(SFAError, match="argmax_logits"):
        SegmentationMetrics(4).update(np.zeros((1, 4, 2, 2)), np.zeros((1, 2, 2), np.int64))
    with pytest.raises(SFAError, match="integer"):
        SegmentationMetrics(4).update(np.zeros((1, 2, 2)), np.zeros((1, 2, 2), np.int64))


def test_a_bad_number_of_classes_or_names_is_refused() -> None:
    with pytest.raises(SFAError, match="1 or more"):
        SegmentationMetrics(0)
    with pytest.raises(SFAError, match="2 class names for 3"):
        SegmentationMetrics(3, class_names=("a", "b"))


def test_argmax_takes_logits_or_a_tuple_that_begins_with_them() -> None:
    logits = torch.zeros(2, 3, 8, 8)
    logits[:, 2, :, 4:] = 1.0

    ids = argmax_logits(logits, torch.zeros(2, 8, 8))

    assert ids.dtype == torch.int64
    assert torch.equal(ids[:, :, :4], torch.zeros(2, 8, 4, dtype=torch.int64))
    assert torch.equal(ids[:, :, 4:], torch.full((2, 8, 4), 2))
    assert torch.equal(argmax_logits((logits, logits), torch.zeros(2, 8, 8)), ids)


def test_small_logits_are_resized_before_the_argmax_not_after() -> None:
    # Two classes cross between the pixels: only interpolated logits put the border in the middle.
    logits = torch.tensor([[[[1.0, 0.0]], [[0.0, 3.0]]]], dtype=torch.bfloat16)

    ids = argmax_logits(logits, torch.zeros(1, 1, 8))

    assert ids.tolist() == [[[0, 0, 0, 1, 1, 1, 1, 1]]]


class _Pixelwise(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.classify = torch.nn.Conv2d(3, 3, 1)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        logits = self.classify(pixel_values)
        return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_trainer_reports_what_a_loop_over_the_set_gives(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.randn(3, 4, 4, generator=generator),
            "labels": torch.randint(0, 3, (4, 4), generator=generator),
        }
        for _ in range(5)
    ]
    model = _Pixelwise()
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(tmp_path),
            per_device_eval_batch_size=2,
            batch_eval_metrics=True,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        eval_dataset=data,  # type: ignore[arg-type]
        compute_metrics=SegmentationMetrics(3, class_names=("a", "b", "c")),
        preprocess_logits_for_metrics=argmax_logits,
    )

    reported = trainer.evaluate()

    direct = SegmentationMetrics(3)
    for item in data:
        direct.update(model.classify(item["pixel_values"][None]).argmax(1), item["labels"][None])
    assert reported["eval_mean_iou"] == direct.compute()["mean_iou"]
    assert 0 <= reported["eval_iou_b"] <= 1
