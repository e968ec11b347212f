# SPDX-License-Identifier: Apache-2.0
"""Inference with heads of transformers, whose outputs mean what their processors say."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sfa_peft.dense.inference import predict_maps, whole_image_maps
from sfa_peft.dense.inference_augmented import multi_scale_probabilities, predict_depth
from tests.head_zoo import HEADS
from tests.model_zoo import require


def head(name: str) -> Any:
    torch.manual_seed(0)
    return HEADS[name][1]().eval()


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_mask2former_scores_equal_those_of_its_processor() -> None:
    model, image = head("mask2former"), pixels(384, 384)  # the size its processor works at
    with torch.no_grad():
        outputs = model(image)
    ids = require("Mask2FormerImageProcessor")().post_process_semantic_segmentation(
        outputs, target_sizes=[(96, 120)]
    )

    maps = whole_image_maps(model, image)

    assert maps.kind == "scores"
    assert torch.equal(maps.resized((96, 120)).values.argmax(1)[0], ids[0])


@pytest.mark.parametrize(("name", "kind"), [("upernet", "logits"), ("mask2former", "scores")])
def test_semantic_heads_take_scales_windows_and_padding(name: str, kind: str) -> None:
    model, image = head(name), pixels(72, 88)

    maps = predict_maps(model, image, crop_size=64, stride=48, size_divisor=32)
    shares = multi_scale_probabilities(
        model, image, scales=(0.75, 1.0), size_divisor=32, size=(50, 60)
    )

    assert maps.kind == kind
    assert maps.values.shape[-2:] == (72, 88)
    assert shares.shape == (1, maps.values.shape[1], 50, 60)
    assert shares.isfinite().all()
    assert (shares >= 0).all()


def test_depth_head_answers_at_the_size_of_the_image() -> None:
    model, image = head("dpt"), pixels(64, 100)

    depth = predict_depth(model, image, num_shifts=3, size_divisor=32)

    assert depth.shape == (1, 64, 100)
    assert depth.isfinite().all()
