# SPDX-License-Identifier: Apache-2.0
"""Evaluation with test-time augmentation, against the obvious loop over images."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfa_peft.dense.metrics.depth import DepthMetrics
from sfa_peft.dense.metrics.segmentation import SegmentationMetrics
from sfa_peft.errors import SFAError

SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_eval_samples", "5"]


def run(task: str, *options: Any) -> tuple[Any, Any, Any]:
    """Return the result of a run, its data, and the model as it was saved."""
    example, methods = importlib.import_module(task), importlib.import_module("common.methods")
    command = [*SHORT, *map(str, options)]
    result = example.main(command)
    args = importlib.import_module("common.arguments").parse(example.Arguments, command, "")
    data = example.load_data(args)
    model = methods.load_method(example.make_model(args, data), args, Path(args.output_dir))
    return result, data, model.requires_grad_(False)


def summed(image: torch.Tensor, scores_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the sum of scores over the scales 1 and 1.5 and the mirror images of each."""
    total = torch.zeros(())
    for side in (64, 96):
        scaled = torch.nn.functional.interpolate(image, (side, side), mode="bilinear")
        for mirrored in (False, True):
            scores = scores_of(scaled.flip(-1) if mirrored else scaled)
            total = total + (scores.flip(-1) if mirrored else scores)
    return total


def test_scales_and_mirror_images_are_averaged(tmp_path: Path, backbone: Path) -> None:
    options = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path]
    result, data, model = run("semantic_segmentation", *options, "--test_scales", 1, 1.5)

    def shares_of(image: torch.Tensor) -> torch.Tensor:
        logits = model(pixel_values=image).logits
        return torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear").softmax(1)

    expected = SegmentationMetrics(len(data.class_names))
    for item in data.evaluation:
        shares = summed(item["pixel_values"][None], shares_of)
        expected.update(shares.argmax(1), item["labels"][None])

    scores = result.row["scores"]
    assert scores["augmented_mean_iou"] == pytest.approx(expected.compute()["mean_iou"], rel=1e-3)
    assert scores["augmented_mean_iou"] != scores["mean_iou"]
    assert result.headers["mIoU augm."] == "augmented_mean_iou"
    assert "augmented_runtime" not in scores


def test_scores_of_queries_are_averaged_as_they_are(tmp_path: Path, backbone: Path) -> None:
    options = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path]
    options += ["--head", "mask2former", "--hidden_size", 32, "--test_scales", 1, 1.5]
    result, data, model = run("semantic_segmentation", *options)

    def scores_of(image: torch.Tensor) -> torch.Tensor:
        summed_over_queries = model(pixel_values=image).logits.exp()
        return torch.nn.functional.interpolate(summed_over_queries, (64, 64), mode="bilinear")

    expected = SegmentationMetrics(len(data.class_names))
    for item in data.evaluation:
        scores = summed(item["pixel_values"][None], scores_of)
        expected.update(scores.argmax(1), item["labels"][None])

    found = result.row["scores"]["augmented_mean_iou"]
    assert found == pytest.approx(expected.compute()["mean_iou"], rel=1e-3)


def test_windows_are_averaged(tmp_path: Path, backbone: Path) -> None:
    options = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path]
    options += ["--test_crop_size", 48, "--test_stride", 16]
    result, data, model = run("semantic_segmentation", *options)

    expected = SegmentationMetrics(len(data.class_names))
    for item in data.evaluation:
        image = item["pixel_values"][None]
        total, count = torch.zeros(1, len(data.class_names), 64, 64), torch.zeros(64, 64)
        for top, left in ((0, 0), (0, 16), (16, 0), (16, 16)):
            place = (..., slice(top, top + 48), slice(left, left + 48))
            total[place] += model(pixel_values=image[place]).logits
            count[place] += 1
        expected.update((total / count).argmax(1), item["labels"][None])

    found = result.row["scores"]["augmented_mean_iou"]
    assert found == pytest.approx(expected.compute()["mean_iou"], rel=1e-3)


def test_depth_is_averaged_with_the_mirror_image(tmp_path: Path, backbone: Path) -> None:
    options = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path, "--test_flip"]
    result, data, model = run("depth_estimation", *options)

    expected = DepthMetrics(importlib.import_module("depth_estimation").MAX_DEPTH)
    for item in data.evaluation:
        image = item["pixel_values"][None]
        mirrored = model(pixel_values=image.flip(-1)).predicted_depth.flip(-1)
        depth = (model(pixel_values=image).predicted_depth + mirrored) / 2
        expected.update(depth, item["labels"][None])

    scores = result.row["scores"]
    assert scores["augmented_rmse"] == pytest.approx(expected.compute()["rmse"], rel=1e-4)
    assert scores["augmented_rmse"] != scores["rmse"]


def test_windows_along_the_width_want_wide_images(tmp_path: Path, backbone: Path) -> None:
    options = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path]
    with pytest.raises(SFAError, match="an image wider than high"):
        run("depth_estimation", *options, "--test_shifts", 2)
    assert not [*tmp_path.iterdir()]  # said before training


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("semantic_segmentation", ["--test_scales", "0"], "--test_scales: expected numbers above"),
        ("semantic_segmentation", ["--test_scales", "inf"], "--test_scales: expected numbers"),
        ("semantic_segmentation", ["--test_stride", "8"], "--test_stride: needs --test_crop_size"),
        (
            "semantic_segmentation",
            ["--test_crop_size", "32", "--test_stride", "33"],
            "leaves gaps",
        ),
        ("depth_estimation", ["--test_shifts", "1"], "--test_shifts: expected 2 or more"),
    ],
)
def test_what_cannot_work_is_said_before_training(
    task: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = importlib.import_module(task)
    with pytest.raises(SystemExit):
        example.main([*SHORT, *options, "--output_dir", str(tmp_path / "out")])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_stride_is_two_thirds_of_the_window_unless_given() -> None:
    example = importlib.import_module("semantic_segmentation")
    args = example.Arguments(test_crop_size=[512])
    args.check()
    assert args.test_crop_size == [512, 512]
    assert np.array_equal(args.test_stride, [342, 342])
