# SPDX-License-Identifier: Apache-2.0
"""Images of several sizes are scored at their own, as a loop over images does it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate, pad

from sfa_peft import SFAError
from sfa_peft.dense.metrics.depth import DepthMetrics
from sfa_peft.dense.metrics.segmentation import SegmentationMetrics
from tests.image_sizes import SIZES

SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--budget", "0.2"]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def run(task: str, folder: Path, backbone: Path, *options: Any) -> tuple[dict[str, Any], Any]:
    """Return the row of results of a run, and the model as it was saved."""
    example, methods = importlib.import_module(task), importlib.import_module("common.methods")
    out = folder.parent / "out"
    command = ["--dataset_name", folder, "--backbone", backbone, "--image_size", 64, *SHORT]
    argv = [*map(str, [*command, "--output_dir", out, *options])]
    args = importlib.import_module("common.arguments").parse(example.Arguments, argv, "")
    example.main(argv)
    data = example.load_data(args)
    model = methods.load_method(example.make_model(args, data), args, out)
    return json.loads((out / "results.json").read_text())["row"], model.requires_grad_(False)


def pairs(folder: Path, kind: str, short: int | None) -> Any:
    """Yield images as tensors, the shorter side as long as asked for, and what is stored."""
    for number, (height, width) in enumerate(SIZES):
        image = Image.open(folder / "validation" / f"{number}_image.png")
        if short is not None:
            factor = short / min(height, width)
            size = int(width * factor + 0.5), int(height * factor + 0.5)
            image = image.resize(size, Image.Resampling.BILINEAR)
        pixels = (np.asarray(image) / 255 - MEAN) / STD
        stored = np.asarray(Image.open(folder / "validation" / f"{number}_{kind}.png"))
        tensor = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None]
        yield tensor, torch.from_numpy(stored.astype(np.float32))[None]


def upernet(model: Any, image: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=image).logits


def mask2former(model: Any, image: torch.Tensor) -> torch.Tensor:
    height, width = image.shape[-2:]
    padded = pad(image, (0, -width % 32, 0, -height % 32))
    outputs = model(pixel_values=padded)
    shares = outputs.class_queries_logits.softmax(-1)[..., :-1]
    masks = bilinear(outputs.masks_queries_logits, padded.shape[-2:]).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", shares, masks)[..., :height, :width]


def bilinear(maps: torch.Tensor, size: Any) -> torch.Tensor:
    return interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


@pytest.mark.parametrize(("head", "maps_of"), [("upernet", upernet), ("mask2former", mask2former)])
def test_classes_are_counted_on_the_pixels_of_the_data(
    head: str, maps_of: Callable[[Any, torch.Tensor], torch.Tensor], folder: Path, backbone: Path
) -> None:
    options = ["--head", head, "--hidden_size", 32, "--test_scales", 1, 1.5]
    row, model = run("semantic_segmentation", folder, backbone, *options)

    plain, augmented = SegmentationMetrics(3), SegmentationMetrics(3)
    for image, labels in pairs(folder, "label", 64):
        size, ids = labels.shape[-2:], labels.long()
        plain.update(bilinear(maps_of(model, image), size).argmax(1), ids)
        total = torch.zeros(())
        for scale in (1, 1.5):
            scaled = bilinear(image, [int(side * scale + 0.5) for side in image.shape[-2:]])
            for mirrored in (False, True):
                maps = maps_of(model, scaled.flip(-1) if mirrored else scaled)
                maps = bilinear(maps.flip(-1) if mirrored else maps, size)
                total = total + (maps.softmax(1) if head == "upernet" else maps)
        augmented.update(total.argmax(1), ids)

    assert row["scored_at"] == "the data's own size"
    for name, expected in plain.compute().items():
        assert row["scores"][name] == pytest.approx(expected, rel=1e-6)
        assert row["scores"][f"augmented_{name}"] == pytest.approx(
            augmented.compute()[name], rel=1e-3
        )


def test_windows_are_brought_to_the_pixels_of_the_data(folder: Path, backbone: Path) -> None:
    options = ["--test_crop_size", 48, "--test_stride", 30]
    row, model = run("semantic_segmentation", folder, backbone, *options)

    expected = SegmentationMetrics(3)
    for image, labels in pairs(folder, "label", 64):
        height, width = image.shape[-2:]
        total, count = torch.zeros(1, 3, height, width), torch.zeros(height, width)
        for top in {min(start, height - 48) for start in range(0, height, 30)}:
            for left in {min(start, width - 48) for start in range(0, width, 30)}:
                place = (..., slice(top, top + 48), slice(left, left + 48))
                total[place] += model(pixel_values=image[place]).logits
                count[place] += 1
        guess = bilinear(total / count, labels.shape[-2:]).argmax(1)
        expected.update(guess, labels.long())

    found = row["scores"]["augmented_mean_iou"]
    assert found == pytest.approx(expected.compute()["mean_iou"], rel=1e-3)


def test_another_size_is_scored_when_asked_for_and_said(folder: Path, backbone: Path) -> None:
    row, model = run("semantic_segmentation", folder, backbone, "--score_size", 16, 24)

    expected = SegmentationMetrics(3)
    for image, labels in pairs(folder, "label", 64):
        small = Image.fromarray(labels[0].numpy().astype(np.uint8)).resize((24, 16), 0)
        guess = bilinear(model(pixel_values=image).logits, (16, 24)).argmax(1)
        expected.update(guess, np.asarray(small)[None])

    assert row["scored_at"] == [16, 24]
    assert row["scores"]["mean_iou"] == pytest.approx(expected.compute()["mean_iou"], rel=1e-6)


def test_own_images_are_trained_at_a_size_that_was_asked_for(folder: Path, backbone: Path) -> None:
    example = importlib.import_module("semantic_segmentation")
    common = importlib.import_module("common.arguments")
    argv = ["--dataset_name", str(folder), "--backbone", str(backbone), *SHORT]
    args = common.parse(example.Arguments, argv, "")
    with Image.open(folder / "train" / "0_image.png") as image:
        first = f"{image.height} x {image.width}"
    with pytest.raises(SFAError, match=rf"--image_size: needed .* The first .* is {first}"):
        example.load_data(args)


@pytest.mark.parametrize("size", [None, 32])
def test_depth_is_counted_on_the_pixels_of_the_data(
    size: int | None, folder: Path, backbone: Path
) -> None:
    options = ["--max_depth", 5, "--test_flip", *(["--eval_size", size] if size else [])]
    row, model = run("depth_estimation", folder, backbone, *options)

    plain, augmented = DepthMetrics(5), DepthMetrics(5)
    for image, stored in pairs(folder, "depth", size):
        metres, shape = stored / 1000, stored.shape[-2:]
        depth = model(pixel_values=image).predicted_depth
        mirrored = model(pixel_values=image.flip(-1)).predicted_depth.flip(-1)
        plain.update(bilinear(depth[:, None], shape), metres)
        augmented.update(bilinear((depth + mirrored)[:, None] / 2, shape), metres)

    assert row["scored_at"] == "the data's own size"
    assert row["scores"]["images"] == len(SIZES)
    for name in ("abs_rel", "rmse", "d1"):
        assert row["scores"][name] == pytest.approx(plain.compute()[name], rel=1e-5)
        found = row["scores"][f"augmented_{name}"]
        assert found == pytest.approx(augmented.compute()[name], rel=1e-4)
