# SPDX-License-Identifier: Apache-2.0
"""Object transforms: boxes follow the pixels, as found again in the transformed image itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.dense.data.object_transforms import (
    ObjectResize,
    ObjectScaleCrop,
    ObjectShortestEdge,
    objects_to_tensors,
    shortest_edge_size,
)
from sfa_peft.dense.data.objects import Objects, objects_of_masks
from sfa_peft.dense.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from sfa_peft.errors import SFAError

_COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)


def _painted(*, with_masks: bool = True, crowd: bool = False) -> tuple[np.ndarray, Objects]:
    """A black image with a red, a green and a blue rectangle that do not touch."""
    image = np.zeros((60, 90, 3), np.uint8)
    masks = np.zeros((3, 60, 90), bool)
    for number, (left, top, right, bottom) in enumerate(
        [(5, 6, 35, 28), (50, 4, 84, 24), (20, 36, 70, 56)]
    ):
        masks[number, top:bottom, left:right] = True
        image[top:bottom, left:right] = _COLOURS[number]
    objects = objects_of_masks(masks, np.arange(3), image_id=7)
    flags = np.array([False, crowd, False])
    return image, Objects(
        objects.boxes, objects.classes, masks if with_masks else None, crowd=flags, image_id=7
    )


def _found(item: dict, colour: int) -> np.ndarray:
    """Where the transformed image is mostly of that colour."""
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = item["pixel_values"] * std + mean
    others = pixels[[c for c in range(3) if c != colour]].max(0).values
    return ((pixels[colour] > 0.5) & (others < 0.35)).numpy()


def _pixels(item: dict) -> np.ndarray:
    """The boxes as left, top, right, bottom in pixels."""
    x, y, w, h = item["labels"]["boxes"].numpy().T
    height, width = item["labels"]["size"].numpy()
    return np.stack(
        ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height), 1
    )


@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize(
    "transform",
    [
        ObjectScaleCrop(72, scale=(0.5, 2.0), jitter=0.0, min_side=0, min_visible=0.0),
        ObjectScaleCrop((40, 96), scale=(0.9, 1.6), jitter=0.0, min_side=0, min_visible=0.0),
        ObjectShortestEdge((40, 60, 100), 120, min_side=0, min_visible=0.0),
        ObjectResize((50, 64)),
        ObjectResize(shortest=80),
        ObjectResize(),
    ],
    ids=lambda t: type(t).__name__,
)
@given(seed=st.integers(0, 10_000))
def test_boxes_and_masks_lie_where_the_pixels_went(transform, with_masks: bool, seed: int) -> None:
    image, objects = _painted(with_masks=with_masks)

    item = transform(image, objects, np.random.default_rng(seed))

    labels = item["labels"]
    for number, box in zip(labels["class_labels"].tolist(), _pixels(item), strict=True):
        seen = _found(item, number)
        if seen.sum() < 12:
            continue  # A sliver: interpolation has mixed its colour away.
        rows, columns = np.nonzero(seen)
        around = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert np.abs(box - around).max() < 2.6
    for number in range(3):
        if _found(item, number).sum() > 60:
            assert number in labels["class_labels"]
    if with_masks:
        for number, mask in zip(labels["class_labels"].tolist(), labels["masks"], strict=True):
            # They may differ along the outline, by interpolation.
            differ = (mask.numpy() ^ _found(item, number)).sum()
            assert differ <= 4 * sum(mask.shape)


def test_an_item_is_laid_out_as_transformers_processor_does() -> None:
    from transformers.models.detr.image_processing_pil_detr import DetrImageProcessorPil

    image, objects = _painted()
    annotations = [
        {
            "bbox": [left, top, right - left, bottom - top],
            "category_id": number,
            "area": float(area),
            "iscrowd": 0,
        }
        for number, ((left, top, right, bottom), area) in enumerate(
            zip(objects.boxes.tolist(), objects.areas, strict=True)
        )
    ]
    processor = DetrImageProcessorPil(size={"height": 48, "width": 72}, do_pad=False)
    theirs = processor(
        images=image, annotations={"image_id": 7, "annotations": annotations}, return_tensors="pt"
    )

    ours = ObjectResize((48, 72))(image, objects)

    labels = dict(theirs["labels"][0])
    assert set(labels) <= set(ours["labels"])
    for name, value in labels.items():
        torch.testing.assert_close(ours["labels"][name], value, msg=name)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"][0], atol=0.02, rtol=0)


def test_training_leaves_crowds_out_and_evaluation_flags_them() -> None:
    image, objects = _painted(crowd=True)
    rng = np.random.default_rng(0)

    cut = ObjectScaleCrop((60, 90), scale=(1.0, 1.0))(image, objects, rng)
    edge = ObjectShortestEdge((60,), crop=0.0)(image, objects, rng)
    kept = ObjectResize()(image, objects)

    assert cut["labels"]["class_labels"].tolist() == [0, 2]
    assert edge["labels"]["class_labels"].tolist() == [0, 2]
    assert kept["labels"]["class_labels"].tolist() == [0, 1, 2]
    assert kept["labels"]["iscrowd"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("with_masks", [True, False])
def test_whatever_is_visible_is_kept_unless_asked_otherwise(with_masks: bool) -> None:
    image, objects = _painted(with_masks=with_masks)
    options = {"scale": (3.0, 3.0), "flip": 0.0, "jitter": 0.0}
    strict = ObjectScaleCrop(24, **options, min_side=2.0, min_visible=0.1)
    dropped = 0
    for seed in range(40):
        item = ObjectScaleCrop(24, **options)(image, objects, np.random.default_rng(seed))
        fewer = strict(image, objects, np.random.default_rng(seed))

        kept = set(item["labels"]["class_labels"].tolist())
        assert {colour for colour in range(3) if _found(item, colour).any()} <= kept
        assert set(fewer["labels"]["class_labels"].tolist()) <= kept
        dropped += len(kept) - len(fewer["labels"]["class_labels"])
    assert dropped > 0


def test_an_image_without_objects_passes_through_everything() -> None:
    image, objects = _painted()
    nothing = objects.take(np.zeros(3, bool))

    for transform in (ObjectScaleCrop(40), ObjectShortestEdge((40,)), ObjectResize(40)):
        labels = transform(image, nothing, np.random.default_rng(1))["labels"]
        assert labels["boxes"].shape == (0, 4)
        assert labels["boxes"].dtype == torch.float32
        assert labels["class_labels"].dtype == torch.int64
        assert labels["masks"].shape[0] == 0


def test_a_flip_of_probability_one_mirrors() -> None:
    image, objects = _painted()
    plain, flipped = (
        ObjectScaleCrop((60, 90), scale=(1.0, 1.0), flip=flip, jitter=0.0)(
            image, objects, np.random.default_rng(0)
        )
        for flip in (0.0, 1.0)
    )

    assert torch.equal(plain["pixel_values"].flip(-1), flipped["pixel_values"])
    assert torch.equal(plain["labels"]["masks"].flip(-1), flipped["labels"]["masks"])
    mirrored = plain["labels"]["boxes"] * torch.tensor([-1.0, 1, 1, 1])
    torch.testing.assert_close(mirrored + torch.tensor([1.0, 0, 0, 0]), flipped["labels"]["boxes"])


def test_randomness_comes_from_the_generator_alone() -> None:
    image, objects = _painted()
    for transform in (ObjectScaleCrop(40), ObjectShortestEdge((40, 50, 60))):
        first, again, other = (
            transform(image, objects, np.random.default_rng(seed)) for seed in (5, 5, 6)
        )
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        assert torch.equal(first["labels"]["boxes"], again["labels"]["boxes"])
        assert first["pixel_values"].shape != other["pixel_values"].shape or not torch.equal(
            first["pixel_values"], other["pixel_values"]
        )


@given(
    st.tuples(st.integers(1, 900), st.integers(1, 900)),
    st.integers(1, 900),
    st.none() | st.integers(1, 1400),
)
def test_the_shorter_side_is_as_asked_unless_the_longer_would_be_too_long(
    size: tuple[int, int], shortest: int, longest: int | None
) -> None:
    new = shortest_edge_size(size, shortest, longest)

    assert min(new) >= 1
    assert longest is None or max(new) <= longest
    wanted = [side * shortest / min(size) for side in size]
    if longest is not None and max(wanted) > longest:
        wanted = [side * longest / max(size) for side in size]
    for side, exact in zip(new, wanted, strict=True):
        assert side == 1 or abs(side - exact) <= 0.5 + 1e-6


def test_masks_or_boxes_of_another_image_are_refused() -> None:
    image, objects = _painted()

    with pytest.raises(SFAError, match=r"image 7 .* 80x60 and 90x60"):
        objects_to_tensors(image[:, :80], objects)
    with pytest.raises(SFAError, match=r"image 7 is 80x60 .* box reaches beyond"):
        ObjectResize(20)(image[:, :80], objects.without_masks())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ObjectScaleCrop(0),
        lambda: ObjectScaleCrop(8, scale=(2.0, 1.0)),
        lambda: ObjectScaleCrop(8, flip=1.5),
        lambda: ObjectScaleCrop(8, min_visible=-0.1),
        lambda: ObjectShortestEdge(()),
        lambda: ObjectShortestEdge((0,)),
        lambda: ObjectShortestEdge((8,), crop=2.0),
        lambda: ObjectResize((0, 4)),
        lambda: ObjectResize(shortest=0),
    ],
)
def test_numbers_out_of_range_are_refused(make) -> None:
    with pytest.raises(SFAError, match=r"must be|expected|need"):
        make()
