# SPDX-License-Identifier: Apache-2.0
"""Depth errors against a loop over pixels, over batches, crops by hand, and on bad input."""

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

from sfa_peft.dense.metrics.depth import (
    SCORE_NAMES,
    DepthMetrics,
    depth_at_labels,
    depth_scores,
    evaluation_mask,
    kb_crop,
)
from sfa_peft.errors import SFAError

LOW, HIGH = 0.5, 8.0


def reference_scores(
    predicted: np.ndarray, labels: np.ndarray, mask: np.ndarray | None = None
) -> dict[str, float] | None:
    """The formulae, pixel by pixel, for one image; None if no pixel counts."""
    sums = dict.fromkeys(SCORE_NAMES, 0.0)
    mean_log, count = 0.0, 0
    for at in np.ndindex(*labels.shape):
        truth = float(labels[at])
        if not (truth > LOW and truth < HIGH) or (mask is not None and not mask[at]):
            continue
        guess = min(max(float(predicted[at]), LOW), HIGH)
        count += 1
        log = math.log(guess) - math.log(truth)
        mean_log += log
        sums["abs_rel"] += abs(guess - truth) / truth
        sums["sq_rel"] += (guess - truth) ** 2 / truth
        sums["rmse"] += (guess - truth) ** 2
        sums["rmse_log"] += log**2
        sums["log10"] += abs(log) / math.log(10)
        for power in (1, 2, 3):
            sums[f"d{power}"] += max(guess / truth, truth / guess) < 1.25**power
    if not count:
        return None
    scores = {name: total / count for name, total in sums.items()}
    scores["silog"] = math.sqrt(scores["rmse_log"] - 0.5 * (mean_log / count) ** 2)
    scores["rmse"], scores["rmse_log"] = math.sqrt(scores["rmse"]), math.sqrt(scores["rmse_log"])
    return scores


def reference_mean(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    images = [reference_scores(p, t) for p, t in zip(predicted, labels, strict=True)]
    present = [image for image in images if image is not None]
    if not present:
        return dict.fromkeys(SCORE_NAMES, math.nan)
    return {name: sum(image[name] for image in present) / len(present) for name in SCORE_NAMES}


@st.composite
def depth_maps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5))
    inside = st.floats(0.125, 10, width=32)
    unlabelled = st.sampled_from([0.0, -1.0, math.nan, math.inf])
    predicted = draw(hnp.arrays(np.float32, shape, elements=st.floats(-1, 20, width=32)))
    return predicted, draw(hnp.arrays(np.float32, shape, elements=st.one_of(inside, unlabelled)))


def metrics() -> DepthMetrics:
    return DepthMetrics(HIGH, min_depth=LOW)


@given(depth_maps())
def test_scores_equal_those_of_a_loop_over_pixels(pair: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, labels = pair
    metric = metrics()
    metric.update(predicted, labels)

    scores = metric.compute()

    for name, expected in reference_mean(predicted, labels).items():
        assert scores[name] == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True), name
    empty = sum(reference_scores(p, t) is None for p, t in zip(predicted, labels, strict=True))
    assert (scores["images"], scores["skipped_images"]) == (len(labels) - empty, empty)


@given(depth_maps(), st.integers(0, 5), st.randoms(use_true_random=False))
def test_neither_batches_nor_the_order_of_images_show(
    pair: tuple[np.ndarray, np.ndarray], cut: int, random: Any
) -> None:
    predicted, labels = pair
    order = list(range(len(labels)))
    random.shuffle(order)
    whole, parts = metrics(), metrics()

    whole.update(predicted, labels)
    for part in (order[:cut], order[cut:]):
        parts.update(torch.from_numpy(predicted[part])[:, None], [labels[i] for i in part])

    np.testing.assert_equal(parts.compute(), whole.compute())


def test_the_order_of_many_images_does_not_show_in_the_last_bit() -> None:
    rng = np.random.default_rng(0)
    predicted, labels = rng.uniform(1, 7, (2, 50, 2, 2)).astype(np.float32)
    there, back = metrics(), metrics()

    there.update(predicted, labels)
    back.update(predicted[::-1], labels[::-1])

    assert there.compute() == back.compute()


@given(depth_maps())
def test_a_perfect_prediction_has_no_error(pair: tuple[np.ndarray, np.ndarray]) -> None:
    labels = pair[1]
    metric = metrics()
    metric.update(np.nan_to_num(labels, posinf=0), labels)

    scores = metric.compute()

    if scores["images"]:
        assert [scores[name] for name in SCORE_NAMES] == [0.0] * 6 + [1.0] * 3


def test_every_image_weighs_the_same_however_few_its_labels() -> None:
    labels = np.zeros((2, 1, 4), np.float32)
    labels[0] = 2.0
    labels[1, 0, 0] = 2.0
    predicted = np.full_like(labels, 2.0)
    predicted[1] = 4.0
    metric = metrics()

    metric.update(predicted, labels)

    assert metric.compute()["abs_rel"] == 0.5  # A mean over the five pixels would be 0.2.


def test_a_threshold_is_strict_and_silog_forgives_half_of_a_common_factor() -> None:
    scores = depth_scores(np.array([1.25, 1.25]), np.array([1.0, 1.0]))

    assert (scores["d1"], scores["d2"]) == (0.0, 1.0)
    assert scores["silog"] == pytest.approx(math.log(1.25) * math.sqrt(0.5))


def test_predictions_are_resized_bilinearly_then_clamped() -> None:
    labels = np.array([[[1.0, 1.0, 1.0, 1.0]]], np.float32)
    metric = metrics()

    metric.update(np.array([[[0.1, 20.0]]], np.float32), labels)

    # Half-pixel centres: .1, .1 + .25 * 19.9, .1 + .75 * 19.9, 20; then into [.5, 8].
    expected = [0.5, 5.075, 8.0, 8.0]
    assert metric.compute()["rmse"] == pytest.approx(
        math.sqrt(np.mean((np.array(expected) - 1) ** 2)), rel=1e-6
    )


def test_the_nyu_protocol_counts_only_the_eigen_crop_below_ten_metres() -> None:
    labels = np.full((1, 480, 640), 5.0, np.float32)
    labels[0, 100, 100] = 10.0  # not below the end of the range
    predicted = np.full_like(labels, 50.0)
    predicted[0, 45:471, 41:601] = 5.0
    predicted[0, 100, 100] = 1.0
    metric = DepthMetrics.nyu()

    metric.update(predicted, labels)
    assert metric.compute()["abs_rel"] == 0.0

    for row, column in ((45, 41), (470, 600)):  # the corners of the crop are in
        predicted[0, row, column] = 6.0
    metric.update(predicted, labels)
    expected = 2 * 0.2 / (426 * 560 - 1)
    assert metric.compute()["abs_rel"] == pytest.approx(expected / 2)


def test_the_kitti_protocol_counts_the_garg_crop_of_the_benchmark_crop() -> None:
    labels = np.full((1, 375, 1242), 40.0, np.float32)
    counted = np.zeros((375, 1242), bool)
    # Crop of 352 x 1216 begins at 23 and 13; Garg's rows 143 to 349 and columns 43 to 1172 of it.
    counted[23 + 143 : 23 + 349, 13 + 43 : 13 + 1172] = True
    predicted = np.where(counted, 40.0, 1.0).astype(np.float32)[None]
    metric = DepthMetrics.kitti()

    metric.update(predicted, labels)
    assert metric.compute()["abs_rel"] == 0.0
    metric.reset()
    metric.update(np.where(counted, 1.0, 40.0)[None], labels)
    assert metric.compute()["abs_rel"] == pytest.approx(39 / 40)
    metric.reset()
    metric.update([kb_crop(predicted[0])], [kb_crop(labels[0])])  # cropped by the data set
    assert metric.compute() == {
        **dict.fromkeys(SCORE_NAMES[:6], 0.0),
        "d1": 1,
        "d2": 1,
        "d3": 1,
    } | {
        "images": 1,
        "skipped_images": 0,
    }


def test_the_eigen_crop_of_kitti_has_its_own_shares() -> None:
    mask = evaluation_mask((352, 1216), "eigen")

    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) == (117, 321, 43, 1172)


def test_an_image_without_labels_is_reported_and_harms_no_other() -> None:
    metric = metrics()
    labels = np.array([[[2.0]], [[0.0]]], np.float32)

    metric.update(np.full((2, 1, 1), 2.0, np.float32), labels)
    scores = metric.compute()
    assert (scores["abs_rel"], scores["images"], scores["skipped_images"]) == (0.0, 1, 1)

    metric.reset()
    metric.update(np.full((1, 1, 1), math.nan, np.float32), labels[1:])
    scores = metric.compute()
    assert math.isnan(scores["abs_rel"])
    assert (scores["images"], scores["skipped_images"]) == (0, 1)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_prediction_that_is_not_finite_is_an_error_and_leaves_the_batch_uncounted(
    wrong: float,
) -> None:
    metric = metrics()
    labels = np.full((2, 1, 2), 2.0, np.float32)
    predicted = labels.copy()
    predicted[1, 0, 1] = wrong

    with pytest.raises(SFAError, match="1 of 2 predicted depths that count are not finite"):
        metric.update(predicted, labels)
    assert metric.compute()["images"] == 0

    labels[1, 0, 1] = 0.0
    metric.update(predicted, labels)  # where nothing is labelled nothing is asked
    assert metric.compute()["abs_rel"] == 0.0


@pytest.mark.parametrize(
    ("predicted", "labels", "message"),
    [
        (np.ones((2, 3, 3)), np.ones((1, 3, 3)), "2 predicted depth maps for 1 labels"),
        (np.ones((1, 2, 3, 3)), np.ones((1, 3, 3)), r"predictions: .* shape \(2, 3, 3\)"),
        (np.ones((3, 3)), np.ones((1, 3, 3)), "a batch of depth maps"),
        (np.ones((1, 3, 3)), np.ones((1, 3, 3), np.uint16), "labels: .* metres .* uint16"),
        (np.ones((1, 0, 3)), np.ones((1, 3, 3)), "predictions: expected depth maps"),
    ],
)
def test_bad_batches_are_refused(predicted: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(SFAError, match=message):
        metrics().update(predicted, labels)


def test_bad_settings_and_sizes_that_do_not_fit_a_crop_are_refused() -> None:
    with pytest.raises(SFAError, match="0 < min_depth < max_depth"):
        DepthMetrics(1.0, min_depth=2.0)
    with pytest.raises(SFAError, match="crop must be"):
        DepthMetrics(1.0, crop="nyu")  # type: ignore[arg-type]
    with pytest.raises(SFAError, match="480x640 labels, got 240x320"):
        DepthMetrics.nyu().update(np.ones((1, 240, 320)), np.ones((1, 240, 320)))
    with pytest.raises(SFAError, match="takes 352x1216 of 300x1242"):
        DepthMetrics.kitti().update(np.ones((1, 300, 1242)), np.ones((1, 300, 1242)))
    with pytest.raises(SFAError, match="of the crop or of the whole"):
        DepthMetrics.kitti().update(np.ones((1, 352, 1216)), np.ones((1, 375, 1242)))
    with pytest.raises(SFAError, match="finite and above 0"):
        depth_scores(np.array([0.0]), np.array([1.0]))
    with pytest.raises(SFAError, match="one at least"):
        depth_scores(np.array([]), np.array([]))


def test_scores_come_with_the_last_batch_and_counting_starts_over() -> None:
    metric = metrics()
    labels = np.full((1, 1, 1), 2.0, np.float32)
    right = SimpleNamespace(predictions=labels, label_ids=labels)
    wrong = SimpleNamespace(predictions=2 * labels, label_ids=labels)

    assert metric(wrong, compute_result=False) == {}
    assert metric(right, compute_result=True)["abs_rel"] == 0.5
    assert metric(right)["abs_rel"] == 0.0


def test_depth_is_taken_from_outputs_of_any_rank_and_dtype() -> None:
    depth = torch.tensor([[[1.0, 3.0]]], dtype=torch.bfloat16)
    labels = torch.zeros(1, 1, 1, 4)

    for outputs in (depth, depth[:, None], (depth, depth)):
        resized = depth_at_labels(outputs, labels)
        assert resized.dtype == torch.float32
        assert resized.tolist() == [[[1.0, 1.5, 2.5, 3.0]]]


class _Scale(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        depth = self.scale * pixel_values.mean(1)
        loss = (depth.mean() - labels.mean()) ** 2
        return {"loss": loss, "predicted_depth": depth, "features": pixel_values}


def test_trainer_reports_what_a_loop_over_the_set_gives(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "pixel_values": torch.rand(3, 4, 4, generator=generator) * 4,
            "labels": torch.rand(8, 8, generator=generator) * 10,
        }
        for _ in range(5)
    ]
    model = _Scale()
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
        compute_metrics=metrics(),
        preprocess_logits_for_metrics=depth_at_labels,
    )

    reported = trainer.evaluate()

    direct = metrics()
    for item in data:
        direct.update(1.5 * item["pixel_values"].mean(0)[None], item["labels"][None])
    assert reported["eval_images"] == 5
    assert reported["eval_abs_rel"] == pytest.approx(direct.compute()["abs_rel"], rel=1e-6)
