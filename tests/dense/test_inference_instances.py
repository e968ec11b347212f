# SPDX-License-Identifier: Apache-2.0
"""Instances of queries against Mask2Former's rule written out pixel by pixel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from sfa_peft.dense import inference_instances
from sfa_peft.dense.coco_masks import decode_mask
from sfa_peft.dense.inference_instances import instances_from_queries
from sfa_peft.errors import SFAError


def slow_resize(logits: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear between half-pixel centres; the border's centres reach to the border."""
    old_height, old_width = logits.shape
    result = np.zeros((height, width))
    for row in range(height):
        y = min(max((row + 0.5) * old_height / height - 0.5, 0), old_height - 1)
        top, below = int(y), min(int(y) + 1, old_height - 1)
        for column in range(width):
            x = min(max((column + 0.5) * old_width / width - 0.5, 0), old_width - 1)
            left, right = int(x), min(int(x) + 1, old_width - 1)
            upper = logits[top, left] * (1 - x % 1) + logits[top, right] * (x % 1)
            lower = logits[below, left] * (1 - x % 1) + logits[below, right] * (x % 1)
            result[row, column] = upper * (1 - y % 1) + lower * (y % 1)
    return result


def slow_instances(
    classes: np.ndarray, masks: np.ndarray, steps: list[tuple[int, int]], top: int
) -> list[tuple[float, int, np.ndarray]]:
    """Score, class and mask of the most probable pairs, by falling score.

    Args:
        classes: `(Q, C + 1)`.
        masks: `(Q, h, w)`.
        steps: Sizes to resize to; after the first, if there are two, 3 rows and 5 columns of
            padding are cut off.
        top: Pairs to keep.
    """
    pairs = []
    for query, logits in enumerate(classes.astype(float)):
        total = sum(math.exp(value) for value in logits)
        pairs += [(math.exp(v) / total, query, c) for c, v in enumerate(logits[:-1])]
    found = []
    for share, query, label in sorted(pairs, reverse=True)[:top]:
        logits = slow_resize(masks[query].astype(float), *steps[0])
        if len(steps) > 1:
            logits = slow_resize(logits[:-3, :-5], *steps[1])
        inside = logits > 0
        if inside.any():
            mean = np.mean(1 / (1 + np.exp(-logits[inside])))
            found.append((share * mean, label, inside))
    return sorted(found, key=lambda one: -one[0])


def queries(seed: int, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    masks = 3 * torch.randn(2, count, 6, 5, generator=generator)
    masks[0, 0] = -masks[0, 0].abs()  # nothing of it is above 0
    return 2 * torch.randn(2, count, 4, generator=generator), masks


def compare(found: dict[str, Any], expected: list[tuple[float, int, np.ndarray]]) -> None:
    np.testing.assert_allclose(found["scores"], [score for score, _, _ in expected], rtol=2e-6)
    np.testing.assert_array_equal(found["labels"], [label for _, label, _ in expected])
    masks = np.array([mask for _, _, mask in expected], bool)
    np.testing.assert_array_equal(found["masks"], masks.reshape(-1, *found["masks"].shape[1:]))


@pytest.mark.parametrize("top", [1, 7, 100])
@pytest.mark.parametrize("seed", range(3))
def test_scores_and_masks_equal_the_slow_reference(seed: int, top: int) -> None:
    classes, masks = queries(seed)
    sizes = [(13, 22), (30, 9)]

    found = instances_from_queries(classes, masks, sizes, top=top)

    for number, size in enumerate(sizes):
        expected = slow_instances(classes[number].numpy(), masks[number].numpy(), [size], top)
        compare(found[number], expected)
        assert found[number]["masks"].dtype == bool


def test_padding_is_cut_off_between_mask2formers_two_steps() -> None:
    classes, masks = queries(3)
    sizes = [(40, 31), (11, 17)]
    inside = torch.zeros(2, 24, 20, dtype=torch.int64)
    inside[:, :-3, :-5] = 1

    found = instances_from_queries(classes, masks, sizes, pixel_mask=inside)

    for number, size in enumerate(sizes):
        steps = [(24, 20), size]
        compare(
            found[number],
            slow_instances(classes[number].numpy(), masks[number].numpy(), steps, 100),
        )


@pytest.mark.parametrize("chunk", [1, 1000, 2**22])
def test_neither_chunks_nor_encoding_change_anything(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    pytest.importorskip("faster_coco_eval")
    classes, masks = queries(4, count=9)
    sizes = [(21, 33), (16, 16)]
    plain = instances_from_queries(classes, masks, sizes)
    monkeypatch.setattr(inference_instances, "CHUNK", chunk)

    encoded = instances_from_queries(classes, masks, sizes, encode=True)

    for one, other, size in zip(plain, encoded, sizes, strict=True):
        np.testing.assert_allclose(one["scores"], other["scores"], rtol=1e-6)
        np.testing.assert_array_equal(one["labels"], other["labels"])
        decoded = [decode_mask(mask, *size) for mask in other["masks"]]
        np.testing.assert_array_equal(one["masks"], decoded)


def test_no_more_logits_than_a_chunk_are_enlarged_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("faster_coco_eval")
    sizes = []

    def spy(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        sizes.append(maps.shape[1] * size[0] * size[1])
        return torch.nn.functional.interpolate(maps, size, mode="bilinear")

    monkeypatch.setattr(inference_instances, "resize", spy)
    monkeypatch.setattr(inference_instances, "CHUNK", 3 * 128 * 128)
    classes, masks = queries(5, count=20)
    inside = torch.ones(2, 128, 128)

    instances_from_queries(classes, masks, [(64, 96)] * 2, pixel_mask=inside, encode=True)

    assert max(sizes) == 3 * 128 * 128


def test_a_threshold_leaves_out_lower_scores_and_nothing_found_has_a_size() -> None:
    classes, masks = queries(6)
    full = instances_from_queries(classes, masks, [(8, 8)] * 2)[0]
    middle = float(full["scores"][3])

    some = instances_from_queries(classes, masks, [(8, 8)] * 2, threshold=middle)[0]
    none = instances_from_queries(classes, -masks.abs(), [(8, 7)] * 2)[1]

    assert some["scores"].tolist() == full["scores"][:4].tolist()
    assert some["masks"].shape == (4, 8, 8)
    assert none["masks"].shape == (0, 8, 7)
    assert none["scores"].shape == none["labels"].shape == (0,)


def test_half_precision_is_counted_in_float32() -> None:
    classes, masks = (tensor.to(torch.bfloat16) for tensor in queries(7))

    found = instances_from_queries(classes, masks, [(20, 20)] * 2)
    expected = instances_from_queries(classes.float(), masks.float(), [(20, 20)] * 2)

    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one["scores"], other["scores"])
        np.testing.assert_array_equal(one["masks"], other["masks"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_logits": torch.zeros(2, 4, 3)}, "expected class logits"),
        ({"mask_logits": torch.zeros(2, 5, 36)}, "expected class logits"),
        ({"class_logits": torch.zeros(2, 5, 1)}, "a class beside 'no object'"),
        ({"top": 0}, "top of 1 or more"),
        ({"sizes": [(8, 8)]}, "height and width of 2 images"),
        ({"sizes": [(8, 8), (0, 8)]}, "height and width of 2 images"),
        ({"pixel_mask": torch.ones(1, 8, 8)}, r"pixel_mask: expected \(2, H, W\)"),
        ({"pixel_mask": torch.zeros(2, 8, 8)}, "an image without any pixel"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[str, Any], message: str) -> None:
    classes, masks = queries(8)
    arguments = {"class_logits": classes, "mask_logits": masks, "sizes": [(8, 8)] * 2, **change}

    with pytest.raises(SFAError, match=message):
        instances_from_queries(**arguments)
