# SPDX-License-Identifier: Apache-2.0
"""Reading outputs, padding and sliding windows, against loops over pixels and windows."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.dense.inference import (
    dense_maps,
    predict_maps,
    sliding_window_maps,
    whole_image_maps,
    window_starts,
)
from sfa_peft.errors import SFAError

sides = st.integers(1, 13)


def images(height: int, width: int, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height * 100 + width)
    return torch.randn(batch, 3, height, width, generator=generator)


class Pointwise:
    """A model that answers in two classes, pixel by pixel, and notes what it saw."""

    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        self.sizes.append(tuple(pixel_values.shape[-2:]))
        return SimpleNamespace(logits=pixel_values[:, :2] * 2)


class Positional:
    """A model whose answer depends on where in its input a pixel is."""

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        height, width = pixel_values.shape[-2:]
        place = torch.arange(height)[:, None] * 10.0 + torch.arange(width)
        return {"logits": pixel_values[:, :2] + place}


def test_mask_queries_become_class_scores_at_the_input_size() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(2, 5, 4, generator=generator)  # 3 classes and "no object"
    masks = torch.randn(2, 5, 4, 6, generator=generator)

    maps = dense_maps(
        SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks), (4, 6)
    )

    assert maps.kind == "scores"
    assert maps.values.shape == (2, 3, 4, 6)
    for b, c, y, x in ((0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4)):
        expected = 0.0
        for q in range(5):
            exponents = np.exp(classes[b, q].numpy().astype(np.float64))
            inside = 1 / (1 + np.exp(-float(masks[b, q, y, x])))
            expected += exponents[c] / exponents.sum() * inside
        assert float(maps.values[b, c, y, x]) == pytest.approx(expected, rel=1e-5)
    assert maps.probabilities() is maps.values


def test_mask_logits_are_resized_before_the_sigmoid() -> None:
    outputs = {
        "class_queries_logits": torch.tensor([[[50.0, 0.0]]]),
        "masks_queries_logits": torch.tensor([[[[-8.0, 8.0]]]], dtype=torch.bfloat16),
    }

    maps = dense_maps(outputs, (1, 4))

    expected = torch.sigmoid(torch.tensor([-8.0, -4.0, 4.0, 8.0]))
    torch.testing.assert_close(maps.values[0, 0, 0], expected)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 1, 2, 2)])
def test_depth_comes_as_one_channel_at_the_input_size(shape: tuple[int, ...]) -> None:
    depth = torch.tensor([1.0, 3.0, 1.0, 3.0], dtype=torch.float16).reshape(shape)

    maps = dense_maps(SimpleNamespace(predicted_depth=depth), (2, 4))

    assert maps.kind == "depth"
    assert maps.values.tolist() == [[[[1.0, 1.5, 2.5, 3.0]] * 2]]
    with pytest.raises(SFAError, match="use predict_depth"):
        maps.probabilities()


def test_a_single_logit_becomes_a_probability_through_a_sigmoid() -> None:
    maps = dense_maps({"logits": torch.zeros(1, 1, 2, 2)}, (2, 2))

    assert maps.probabilities().tolist() == [[[[0.5, 0.5]] * 2]]


@pytest.mark.parametrize(
    "outputs",
    [
        SimpleNamespace(logits=torch.zeros(1, 4)),
        {"predicted_depth": torch.zeros(1, 2, 3, 3)},
        SimpleNamespace(last_hidden_state=torch.zeros(1, 4, 4)),
        torch.zeros(1, 2, 3, 3),
    ],
)
def test_outputs_that_are_not_dense_are_refused(outputs: Any) -> None:
    with pytest.raises(SFAError, match="expected outputs with logits"):
        dense_maps(outputs, (4, 4))


@given(sides, sides, st.integers(1, 8))
def test_padding_reaches_the_divisor_and_is_cut_off_again(
    height: int, width: int, divisor: int
) -> None:
    model, pixels = Pointwise(), images(height, width)

    maps = whole_image_maps(model, pixels, size_divisor=divisor)

    assert torch.equal(maps.values, pixels[:, :2] * 2)
    ((padded_height, padded_width),) = model.sizes
    assert padded_height % divisor == padded_width % divisor == 0
    assert 0 <= padded_height - height < divisor
    assert 0 <= padded_width - width < divisor


def test_padding_is_zero_below_and_to_the_right() -> None:
    seen = []

    def model(pixel_values: torch.Tensor) -> Any:
        seen.append(pixel_values)
        return {"logits": pixel_values[:, :2, ::2, ::2]}  # answers at half the size

    maps = whole_image_maps(model, torch.ones(1, 3, 3, 3), size_divisor=4)

    assert seen[0][0, 0].tolist() == [[1, 1, 1, 0]] * 3 + [[0] * 4]
    # Half-size 1, 1 / 1, 1 (rows 0 and 2 are inside): resized to 4 x 4, then cut.
    assert torch.equal(maps.values, torch.ones(1, 2, 3, 3))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 12))
def test_windows_cover_a_side_without_gaps_and_stay_inside(
    length: int, crop: int, stride: int
) -> None:
    stride = min(stride, crop)

    starts = window_starts(length, crop, stride)

    covered = {pixel for start in starts for pixel in range(start, start + crop)}
    assert set(range(length)) <= covered
    assert starts[0] == 0
    assert starts[-1] == max(length - crop, 0)
    assert all(0 < b - a <= stride for a, b in pairwise(starts))


@given(sides, sides, st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(1, 6))
def test_windows_are_averaged_by_the_number_that_hold_a_pixel(
    height: int, width: int, crop_h: int, crop_w: int, stride_h: int, stride_w: int
) -> None:
    stride_h, stride_w = min(stride_h, crop_h), min(stride_w, crop_w)
    pixels, model = images(height, width, batch=1), Positional()
    # mmseg's slide_inference, spelt out: a list of answers for every pixel.
    answers: dict[tuple[int, int], list[float]] = {}
    for i in range(max(height - crop_h + stride_h - 1, 0) // stride_h + 1):
        for j in range(max(width - crop_w + stride_w - 1, 0) // stride_w + 1):
            bottom, right = min(i * stride_h + crop_h, height), min(j * stride_w + crop_w, width)
            top, left = max(bottom - crop_h, 0), max(right - crop_w, 0)
            said = model(pixels[:, :, top:bottom, left:right])["logits"]
            for y in range(top, bottom):
                for x in range(left, right):
                    answers.setdefault((y, x), []).append(float(said[0, 1, y - top, x - left]))

    maps = sliding_window_maps(
        model, pixels, crop_size=(crop_h, crop_w), stride=(stride_h, stride_w)
    )

    for (y, x), values in answers.items():
        assert float(maps.values[0, 1, y, x]) == pytest.approx(np.mean(values), rel=1e-4, abs=1e-4)
    assert len(answers) == height * width


@given(sides, sides, st.integers(1, 6), st.integers(1, 6), st.integers(1, 4))
def test_windows_change_nothing_for_a_model_that_looks_at_one_pixel(
    height: int, width: int, crop: int, stride: int, divisor: int
) -> None:
    pixels = images(height, width)

    maps = predict_maps(
        Pointwise(), pixels, crop_size=crop, stride=min(stride, crop), size_divisor=divisor
    )

    torch.testing.assert_close(maps.values, pixels[:, :2] * 2)


def test_every_window_has_the_full_size_if_the_image_allows_it() -> None:
    model = Pointwise()

    sliding_window_maps(model, images(9, 4), crop_size=(6, 6), stride=4)

    assert model.sizes == [(6, 4), (6, 4)]


def test_bad_settings_are_refused() -> None:
    model, pixels = Pointwise(), images(4, 4)

    with pytest.raises(SFAError, match="leaves gaps"):
        sliding_window_maps(model, pixels, crop_size=(4, 2), stride=3)
    with pytest.raises(SFAError, match="crop_size must be 1 or more"):
        sliding_window_maps(model, pixels, crop_size=0, stride=0)
    with pytest.raises(SFAError, match="go together"):
        predict_maps(model, pixels, crop_size=4)
    with pytest.raises(SFAError, match="size_divisor"):
        whole_image_maps(model, pixels, size_divisor=0)
    with pytest.raises(SFAError, match=r"expected images \(B, 3, H, W\), got \(3, 4, 4\)"):
        whole_image_maps(model, pixels[0])
    with pytest.raises(SFAError, match="2 images went in, 1 maps"):
        whole_image_maps(lambda pixel_values: {"logits": pixel_values[:1]}, pixels)
    with pytest.raises(SFAError, match=r"model\.eval\(\)"):
        whole_image_maps(torch.nn.Conv2d(3, 2, 1), pixels)


def test_no_graph_is_built() -> None:
    layer = torch.nn.Conv2d(3, 2, 1)

    maps = predict_maps(
        lambda pixel_values: {"logits": layer(pixel_values)}, images(4, 4), crop_size=2, stride=2
    )

    assert not maps.values.requires_grad
