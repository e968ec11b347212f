# SPDX-License-Identifier: Apache-2.0
"""Collators: padding, what is in a batch, and that the heads of transformers take it."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Swinv2Config,
)

from sfa_peft.dense.data.collate import (
    collate_detection,
    collate_instances,
    collate_semantic_masks,
)
from sfa_peft.dense.data.object_transforms import ObjectScaleCrop, ObjectShortestEdge
from sfa_peft.dense.data.splits import TransformedSplit
from sfa_peft.dense.data.transforms import IGNORE_INDEX, TrainTransform
from sfa_peft.dense.scenes.splits import THING_NAMES, SceneSplit
from sfa_peft.errors import SFAError


def _items(task: str = "instances", count: int = 3) -> list[dict]:
    split = TransformedSplit(SceneSplit(count, task), ObjectShortestEdge((48, 64, 80), 90))
    return [split[index] for index in range(count)]


def _empty(item: dict) -> dict:
    kept = {"class_labels", "boxes", "area", "iscrowd", "masks"}
    labels = {name: value[:0] if name in kept else value for name, value in item["labels"].items()}
    return item | {"labels": labels}


def _backbone(*stages: str) -> Swinv2Config:
    return Swinv2Config(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=list(stages),
    )


@pytest.mark.parametrize("multiple", [1, 32])
def test_images_are_padded_at_right_and_bottom_and_the_mask_says_so(multiple: int) -> None:
    items = _items()

    batch = collate_detection(items, multiple=multiple)

    height, width = batch["pixel_values"].shape[-2:]
    tallest = max(item["pixel_values"].shape[1] for item in items)
    assert height % multiple == 0
    assert tallest <= height < tallest + multiple
    assert width % multiple == 0
    for number, item in enumerate(items):
        image = item["pixel_values"]
        rows, columns = image.shape[1:]
        assert torch.equal(batch["pixel_values"][number, :, :rows, :columns], image)
        assert batch["pixel_mask"][number].sum() == rows * columns
        assert batch["pixel_mask"][number, :rows, :columns].all()
        outside = batch["pixel_values"][number][:, batch["pixel_mask"][number] == 0]
        assert not outside.any()


def test_detection_keeps_boxes_and_leaves_masks_out() -> None:
    items = _items()

    labels = collate_detection(items)["labels"]

    for mine, item in zip(labels, items, strict=True):
        assert set(mine) == set(item["labels"]) - {"masks"}
        assert torch.equal(mine["boxes"], item["labels"]["boxes"])


def test_instances_pad_masks_as_the_images() -> None:
    items = _items()

    batch = collate_instances(items, multiple=16)

    assert set(batch) == {"pixel_values", "pixel_mask", "mask_labels", "class_labels"}
    for masks, classes, item in zip(
        batch["mask_labels"], batch["class_labels"], items, strict=True
    ):
        own = item["labels"]["masks"]
        assert masks.dtype == torch.float32
        assert masks.shape == (len(classes), *batch["pixel_values"].shape[-2:])
        assert torch.equal(masks[:, : own.shape[1], : own.shape[2]], own.float())
        assert masks.sum() == own.sum()


def test_semantic_masks_are_one_per_class_and_ignored_pixels_in_none() -> None:
    split = TransformedSplit(SceneSplit(2), TrainTransform(64, scale=(0.5, 0.6)))
    items = [split[0], split[1]]

    batch = collate_semantic_masks(items)

    for masks, classes, item in zip(
        batch["mask_labels"], batch["class_labels"], items, strict=True
    ):
        back = torch.full_like(item["labels"], IGNORE_INDEX)
        for mask, name in zip(masks, classes, strict=True):
            back[mask == 1] = name
        assert torch.equal(back, item["labels"])
        assert (item["labels"] == IGNORE_INDEX).any()
        assert IGNORE_INDEX not in classes


def test_detr_takes_the_batch_an_image_without_objects_too() -> None:
    items = _items("detection")
    items[1] = _empty(items[1])
    torch.manual_seed(0)
    config = DetrConfig(
        backbone_config=_backbone("stage3"),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        num_labels=len(THING_NAMES),
    )

    loss = DetrForObjectDetection(config)(**collate_detection(items)).loss

    assert torch.isfinite(loss)


@pytest.mark.parametrize("semantic", [False, True])
def test_mask2former_takes_the_batch_an_image_without_objects_too(semantic: bool) -> None:
    torch.manual_seed(0)
    if semantic:
        split = TransformedSplit(SceneSplit(2), TrainTransform(64))
        batch = collate_semantic_masks([split[0], split[1]])
    else:
        split = TransformedSplit(SceneSplit(2, "instances"), ObjectScaleCrop(64))
        batch = collate_instances([split[0], _empty(split[1])])
    config = Mask2FormerConfig(
        backbone_config=_backbone("stage1", "stage2", "stage3", "stage4"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        num_queries=12,
        num_labels=8,
    )

    loss = Mask2FormerForUniversalSegmentation(config)(**batch).loss

    assert torch.isfinite(loss)


def test_what_cannot_be_a_batch_is_refused() -> None:
    items = _items("detection", 2)

    with pytest.raises(SFAError, match=r"item 0 .* no masks"):
        collate_instances(items)
    with pytest.raises(SFAError, match="need items"):
        collate_detection([])
    with pytest.raises(SFAError, match="multiple of 1 or more"):
        collate_detection(items, multiple=0)
