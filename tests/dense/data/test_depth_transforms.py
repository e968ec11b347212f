# SPDX-License-Identifier: Apache-2.0
"""Depth transforms: depth follows the pixels, no value is invented, scale keeps metres true."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sfa_peft.dense.data.depth import nyu_border_crop
from sfa_peft.dense.data.depth_transforms import DepthEvalTransform, DepthTrainTransform
from sfa_peft.dense.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from sfa_peft.errors import SFAError

_PLAIN = {"flip": 0.0, "jitter": 0.0, "cut_depth": 0.0}


def _ramp(along: int, height: int = 40, width: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Grey values 40, 43, ... and as many decimetres."""
    grey = (40 + 3 * np.indices((height, width))[along]).astype(np.uint8)
    return np.repeat(grey[..., None], 3, 2), grey.astype(np.float32) / 10


def _grey(pixel_values: torch.Tensor) -> torch.Tensor:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return ((pixel_values * std[:, None, None] + mean[:, None, None]) * 255).mean(0)


@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(24, 80), st.integers(24, 80)),
    scale=st.sampled_from([(1.0, 1.0), (0.5, 0.9), (1.0, 2.5)]),
    fit=st.booleans(),
    along=st.sampled_from([0, 1]),
)
def test_depth_follows_the_image(seed: int, size, scale, fit: bool, along: int) -> None:
    image, depth = _ramp(along)
    transform = DepthTrainTransform(
        size, max_depth=100.0, scale=scale, fit=fit, divide_depth=False, jitter=0, cut_depth=0
    )

    item = transform(image, depth, np.random.default_rng(seed))

    measured = item["labels"] > 0
    assert item["labels"].shape == size
    assert measured.any()
    assert set(item["labels"][measured].unique().tolist()) <= set(depth.ravel().tolist())
    off = (_grey(item["pixel_values"]) - item["labels"] * 10).abs()[measured]
    assert off.max() < 9  # At scale 0.4 a pixel of the result spans 2.5 of the ramp's steps of 3.


@pytest.mark.parametrize("drawn", [0.5, 1.0, 2.0])
def test_metres_are_divided_by_the_scale_drawn(drawn: float) -> None:
    image, depth = _ramp(0, 40, 40)

    item = DepthTrainTransform(40, max_depth=100.0, scale=(drawn, drawn), **_PLAIN)(
        image, depth, np.random.default_rng(0)
    )

    measured = item["labels"] > 0
    values = set((depth / drawn).astype(np.float32).ravel().tolist())
    assert set(item["labels"][measured].tolist()) <= values
    assert measured.float().mean() == pytest.approx(min(1.0, drawn**2))


def test_what_comes_nearer_by_scale_is_learned_and_what_goes_beyond_is_not() -> None:
    image, depth = _ramp(0, 40, 40)  # 4 to 15.7 m
    make = lambda drawn: DepthTrainTransform(40, max_depth=9.0, scale=(drawn, drawn), **_PLAIN)  # noqa: E731

    near = make(2.0)(image, depth, np.random.default_rng(0))["labels"]
    far = make(0.7)(image, depth, np.random.default_rng(0))["labels"]

    assert (near > 0).all()
    assert near.max() <= 15.7 / 2
    assert far[far > 0].min() > 0
    assert far.max() <= 9.0


def test_holes_stay_holes_and_never_mix_with_depth() -> None:
    image, _ = _ramp(0)
    depth = np.where(np.random.default_rng(0).random((40, 60)) < 0.5, 0, 7).astype(np.float32)

    for seed in range(10):
        transform = DepthTrainTransform(33, max_depth=10, scale=(0.6, 2.0), divide_depth=False)
        values = transform(image, depth, np.random.default_rng(seed))["labels"].unique().tolist()
        assert values == [0.0, 7.0]
    resized = DepthEvalTransform(label_size=(15, 77))(image, depth)["labels"]
    assert resized.unique().tolist() == [0.0, 7.0]


def test_a_flip_mirrors_both() -> None:
    image, depth = _ramp(1, 40, 40)
    plain, flipped = (
        DepthTrainTransform(40, max_depth=99, scale=(1, 1), **(_PLAIN | {"flip": flip}))(
            image, depth, np.random.default_rng(0)
        )
        for flip in (0.0, 1.0)
    )

    assert torch.equal(plain["labels"].flip(-1), flipped["labels"])
    assert torch.equal(plain["pixel_values"].flip(-1), flipped["pixel_values"])


def test_colours_and_cut_depth_leave_the_labels_alone() -> None:
    image, depth = _ramp(0, 40, 40)
    plain = DepthTrainTransform(40, max_depth=99, scale=(1, 1), **_PLAIN)
    changed = DepthTrainTransform(40, max_depth=99, scale=(1, 1), flip=0, jitter=0.2, cut_depth=1)

    first, second = (t(image, depth, np.random.default_rng(1)) for t in (plain, changed))

    assert torch.equal(first["labels"], second["labels"])
    assert not torch.allclose(first["pixel_values"], second["pixel_values"], atol=0.05)


def test_without_fit_a_crop_of_scale_one_is_cut_from_the_image_as_it_is() -> None:
    image, depth = _ramp(1, 100, 60)
    transform = DepthTrainTransform((30, 30), max_depth=99, scale=(1, 1), fit=False, **_PLAIN)

    item = transform(image, depth, np.random.default_rng(3))

    first = round((float(item["labels"][0, 0]) * 10 - 40) / 3)
    np.testing.assert_array_equal(item["labels"].numpy(), depth[:30, first : first + 30])


def test_a_crop_holds_depth_if_the_image_has_any() -> None:
    image, depth = _ramp(0, 100, 100)
    depth = np.zeros_like(depth)
    depth[90, 7] = 5.0

    for seed in range(30):
        transform = DepthTrainTransform(16, max_depth=10, scale=(1, 1), fit=False, **_PLAIN)
        assert transform(image, depth, np.random.default_rng(seed))["labels"].sum() == 5.0


def test_an_image_without_any_depth_is_refused_unless_asked_for() -> None:
    image, depth = _ramp(0)

    with pytest.raises(SFAError, match=r"no depth up to 3\.0 m"):
        DepthTrainTransform(20, max_depth=3.0)(image, depth, np.random.default_rng(0))
    kept = DepthTrainTransform(20, max_depth=3.0, keep_unlabelled=True)
    assert not kept(image, depth, np.random.default_rng(0))["labels"].any()


def test_a_protocol_crop_comes_first() -> None:
    image = np.zeros((480, 640, 3), np.uint8)
    depth = np.full((480, 640), 9.0, np.float32)
    depth[45:472, 43:608] = 2.0

    train = DepthTrainTransform(96, max_depth=10, crop=nyu_border_crop, divide_depth=False)
    item = DepthEvalTransform(crop=nyu_border_crop)(image, depth)

    assert item["labels"].shape == (427, 565)
    assert item["labels"].unique().tolist() == [2.0]
    assert train(image, depth, np.random.default_rng(0))["labels"].unique().tolist() == [2.0]
    with pytest.raises(SFAError, match="640x480"):
        train(image[:400], depth[:400], np.random.default_rng(0))


def test_evaluation_leaves_size_and_metres_alone_by_default() -> None:
    image, depth = _ramp(0)

    item = DepthEvalTransform()(Image.fromarray(image), depth)
    smaller = DepthEvalTransform(20)(image, depth)
    limited = DepthEvalTransform(label_size=(20, 30), max_depth=5.0)(image, depth)["labels"]

    np.testing.assert_array_equal(item["labels"].numpy(), depth)
    assert smaller["pixel_values"].shape == (3, 20, 30)
    np.testing.assert_array_equal(smaller["labels"].numpy(), depth)
    assert limited.shape == (20, 30)
    assert limited.max() <= 5.0


def test_randomness_comes_from_the_generator_alone() -> None:
    image, depth = _ramp(0)
    transform = DepthTrainTransform(24, max_depth=99)

    first, again, other = (transform(image, depth, np.random.default_rng(s)) for s in (5, 5, 6))

    for name in ("pixel_values", "labels"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"max_depth": 0.0},
        {"scale": (2.0, 1.0)},
        {"flip": 2},
        {"jitter": 1.0},
        {"cut_depth": -1},
    ],
)
def test_numbers_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(SFAError, match=r"must be|expected"):
        DepthTrainTransform(**({"size": 8, "max_depth": 10.0} | wrong))
