# SPDX-License-Identifier: Apache-2.0
"""Scenes per task: targets agree with the scene's own maps, and are hard but not too small."""

from __future__ import annotations

import numpy as np
import pytest

from sfa_peft.dense.scenes.render import CLASS_NAMES, MAX_DEPTH, SKY, SceneDataset, render_scene
from sfa_peft.dense.scenes.splits import TASKS, THING_NAMES, SceneSplit
from sfa_peft.errors import SFAError


@pytest.fixture(scope="module")
def crowd() -> SceneSplit:
    return SceneSplit(150, "instances")


def test_segmentation_and_depth_are_those_of_the_scene_dataset() -> None:
    dataset = SceneDataset(3, size=48, seed=4)

    for index in range(3):
        image, mask = SceneSplit(3, size=48, seed=4)[index]
        np.testing.assert_array_equal(np.asarray(image), dataset.scene(index).image)
        np.testing.assert_array_equal(np.asarray(mask), dataset.scene(index).classes)
        _, depth = SceneSplit(3, "depth", size=48, seed=4)[index]
        np.testing.assert_array_equal(depth, dataset.scene(index).depth)
        assert depth.dtype == np.float32


def test_depth_is_metric_and_zero_on_the_sky_only() -> None:
    split = SceneSplit(20, "depth")

    for index in range(20):
        depth = split[index][1]
        np.testing.assert_array_equal(depth == 0, split.scene(index).classes == SKY)
        assert depth[depth > 0].min() > 1
        assert depth.max() <= MAX_DEPTH


def test_every_object_is_one_instance_of_the_scene_with_its_class_and_box(
    crowd: SceneSplit,
) -> None:
    for index in range(len(crowd)):
        scene, (_, objects) = crowd.scene(index), crowd[index]
        numbers = []
        for mask, box, kind in zip(objects.masks, objects.boxes, objects.classes, strict=True):
            (number,) = np.unique(scene.instances[mask])
            np.testing.assert_array_equal(mask, scene.instances == number)
            (name,) = {CLASS_NAMES[c] for c in np.unique(scene.classes[mask])}
            assert THING_NAMES[kind] == name
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [
                columns.min(),
                rows.min(),
                columns.max() + 1,
                rows.max() + 1,
            ]
            numbers.append(number)
        for number in set(range(1, scene.instances.max() + 1)) - set(numbers):
            assert (scene.instances == number).sum() < 16  # 1/256 of 64 x 64


def test_detection_is_the_same_without_masks(crowd: SceneSplit) -> None:
    detection = SceneSplit(150, "detection")[3][1]

    assert detection.masks is None
    np.testing.assert_array_equal(detection.boxes, crowd[3][1].boxes)
    np.testing.assert_array_equal(detection.areas, crowd[3][1].areas)
    assert detection.image_id == 3


def test_crowds_repeat_classes_hide_things_and_still_fill_a_quarter(crowd: SceneSplit) -> None:
    every = [crowd[index][1] for index in range(len(crowd))]
    counts = np.array([len(objects) for objects in every])
    covered = np.array([objects.masks.any(0).mean() for objects in every])
    boxes = np.concatenate([objects.boxes for objects in every])
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    filled = np.concatenate([o.areas for o in every]) / sides**2
    repeats = np.mean([len(set(o.classes.tolist())) < len(o) for o in every])

    assert counts.min() >= 1
    assert 5 < counts.mean() < 8
    assert (covered > 0.25).mean() > 0.9
    assert repeats > 0.7
    assert (filled < 0.5).mean() > 0.1  # hidden in part: less than half of its own box is seen
    assert np.quantile(sides, 0.9) > 3 * np.quantile(sides, 0.1)  # near and far
    classes = np.bincount(np.concatenate([o.classes for o in every]), minlength=len(THING_NAMES))
    assert classes.min() > 0.08 * classes.sum()


def test_crowded_scenes_are_pure_functions_of_the_seed_and_differ_from_plain_ones() -> None:
    first, again, plain = (render_scene(3, crowded=crowded) for crowded in (True, True, False))

    np.testing.assert_array_equal(first.image, again.image)
    assert (first.image != plain.image).any()


def test_two_seeds_share_no_scene_and_length_changes_none() -> None:
    one, two = SceneSplit(4, "detection", seed=0), SceneSplit(9, "detection", seed=1)

    assert (np.asarray(one[0][0]) != np.asarray(two[0][0])).any()
    np.testing.assert_array_equal(
        np.asarray(one[2][0]), np.asarray(SceneSplit(9, "detection", seed=0)[2][0])
    )


def test_bad_arguments_and_indices_are_refused() -> None:
    with pytest.raises(SFAError, match="task `panoptic`: expected one of"):
        SceneSplit(3, "panoptic")
    with pytest.raises(SFAError, match="length >= 1"):
        SceneSplit(0)
    with pytest.raises(SFAError, match="min_visible"):
        SceneSplit(3, "detection", min_visible=1.0)
    for task in TASKS:
        with pytest.raises(IndexError):
            SceneSplit(3, task)[3]
