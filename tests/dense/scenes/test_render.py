# SPDX-License-Identifier: Apache-2.0
"""Scenes: determinism, ranges, geometry, and no global randomness."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch

from sfa_peft.dense.data.transforms import TrainTransform
from sfa_peft.dense.scenes.render import (
    CLASS_NAMES,
    GROUND,
    MAX_DEPTH,
    MIN_SIZE,
    SKY,
    Scene,
    SceneDataset,
    render_scene,
)
from sfa_peft.errors import SFAError


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [render_scene(seed) for seed in range(120)]


def test_a_scene_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = render_scene(3), render_scene(3), render_scene(4)

    for name in ("image", "classes", "depth", "instances"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert (first.image != other.image).any()
    assert (first.classes != other.classes).any()


def test_rendering_leaves_every_global_random_state_alone() -> None:
    before = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002

    SceneDataset(2, transform=TrainTransform(32))[1]

    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("size", [MIN_SIZE, 33, 64, 128])
def test_maps_have_the_promised_shapes_and_types(size: int) -> None:
    scene = render_scene(0, size)

    assert (scene.image.dtype, scene.image.shape) == (np.uint8, (size, size, 3))
    assert (scene.classes.dtype, scene.classes.shape) == (np.uint8, (size, size))
    assert (scene.depth.dtype, scene.depth.shape) == (np.float32, (size, size))
    assert (scene.instances.dtype, scene.instances.shape) == (np.uint16, (size, size))


def test_every_class_occurs_and_things_cover_a_quarter_of_most_scenes(scenes: list[Scene]) -> None:
    classes = np.stack([scene.classes for scene in scenes])
    share = np.bincount(classes.ravel(), minlength=len(CLASS_NAMES)) / classes.size
    things = ((classes != SKY) & (classes != GROUND)).mean((1, 2))

    assert classes.max() < len(CLASS_NAMES)
    assert share.min() > 0.03
    assert share.max() < 0.45
    assert (things > 0.25).mean() > 0.9


def test_depth_is_zero_on_the_sky_only_and_grows_up_the_ground(scenes: list[Scene]) -> None:
    for scene in scenes:
        np.testing.assert_array_equal(scene.depth == 0, scene.classes == SKY)
        assert scene.depth.max() <= MAX_DEPTH
        for column in range(0, 64, 9):
            ground = scene.depth[scene.classes[:, column] == GROUND, column]
            assert (np.diff(ground) < 0).all()


def test_an_instance_is_of_one_class_and_background_is_none(scenes: list[Scene]) -> None:
    for scene in scenes:
        background = (scene.classes == SKY) | (scene.classes == GROUND)
        np.testing.assert_array_equal(scene.instances == 0, background)
        for number in range(1, int(scene.instances.max()) + 1):
            assert np.unique(scene.classes[scene.instances == number]).size <= 1


def test_what_hides_another_thing_is_nearer(scenes: list[Scene]) -> None:
    for scene in scenes:
        # Numbers go from far to near; a surface is at most a metre nearer than its foot.
        nearest = [
            scene.depth[scene.instances == number].min()
            for number in np.unique(scene.instances)
            if number
        ]
        assert all(a > b - 1.0 for a, b in itertools.pairwise(nearest))


def test_colour_alone_says_little_about_the_class(scenes: list[Scene]) -> None:
    mean = np.stack(
        [
            np.concatenate([s.image[s.classes == c] for s in scenes]).mean(0)
            for c in range(2, len(CLASS_NAMES))
        ]
    )
    spread = np.concatenate([s.image[s.classes > GROUND] for s in scenes]).std(0)

    assert (mean.std(0) < 0.35 * spread).all()


@pytest.mark.parametrize(("seed", "size"), [(-1, 64), (0, MIN_SIZE - 1)])
def test_a_bad_seed_or_size_is_refused(seed: int, size: int) -> None:
    with pytest.raises(SFAError, match="a scene needs"):
        render_scene(seed, size)


def test_an_item_is_what_a_model_takes() -> None:
    dataset = SceneDataset(4, size=48, with_depth=True)

    item = dataset[2]

    assert len(dataset) == 4
    assert item["pixel_values"].dtype == torch.float32
    assert item["pixel_values"].shape == (3, 48, 48)
    assert item["pixel_values"].abs().max() < 2.8
    assert item["labels"].dtype == torch.int64
    torch.testing.assert_close(
        item["labels"], torch.from_numpy(dataset.scene(2).classes).long(), rtol=0, atol=0
    )
    torch.testing.assert_close(item["depth"], torch.from_numpy(dataset.scene(2).depth))


def test_an_item_depends_on_seed_and_index_only() -> None:
    dataset, longer, other = SceneDataset(3), SceneDataset(9), SceneDataset(3, seed=1)
    backwards = [dataset[i]["pixel_values"] for i in (2, 1, 0)][::-1]

    for index in range(3):
        assert torch.equal(backwards[index], longer[index]["pixel_values"])
        assert not torch.equal(backwards[index], other[index]["pixel_values"])


def test_a_transform_is_applied_and_repeatable() -> None:
    dataset = SceneDataset(3, transform=TrainTransform(32))

    first, again = dataset[1], dataset[1]

    assert first["pixel_values"].shape == (3, 32, 32)
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["labels"], again["labels"])


def test_the_dataset_ends() -> None:
    assert len(list(SceneDataset(3, size=16))) == 3  # Iteration by index stops at IndexError.
    with pytest.raises(IndexError, match="scene 3"):
        SceneDataset(3).scene(3)


def test_a_dataset_with_nothing_in_it_is_refused() -> None:
    with pytest.raises(SFAError, match="length >= 1"):
        SceneDataset(0)
    with pytest.raises(SFAError, match="seed >= 0"):
        SceneDataset(1, seed=-1)


def test_depth_beside_a_transform_is_refused() -> None:
    with pytest.raises(SFAError, match="with_depth"):
        SceneDataset(1, transform=TrainTransform(32), with_depth=True)
