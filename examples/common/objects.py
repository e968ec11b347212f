# SPDX-License-Identifier: Apache-2.0
"""Detected objects: evaluation by COCO's rules, and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.items import picture
from sfa_peft.dense import decode_mask, true_objects
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.pictures.objects import ObjectPicture, object_sheet

DRAWN_SCORE = 0.5  # predictions below are left out of pictures

# Of a model, a batch and the height and width to come out at: the objects in each image.
Predict = Callable[[Any, dict[str, Any], list[tuple[int, int]]], list[dict[str, Any]]]


def evaluate(
    model: Any,
    data: Dataset[dict[str, Any]],
    metric: CocoMetrics,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    predict: Predict,
    num_workers: int = 0,
) -> dict[str, float]:
    """Return COCO's scores of a model, counted in each image's own frame.

    Args:
        model: It takes `pixel_values` and `pixel_mask`.
        data: Items with `pixel_values` and `labels`.
        metric: Counts boxes or masks.
        collate: Makes a batch of items.
        predict: Returns the objects in each image of a batch, for `CocoMetrics.update`.
        num_workers: Processes that load data.
    """
    model.eval()
    metric.reset()
    loader = DataLoader(data, batch_size=8, collate_fn=list, num_workers=num_workers)
    for items in loader:
        truths = [true_objects(item["labels"]) for item in items]
        metric.update(predict(model, collate(items), _sizes(items, "orig_size")), truths)
    return metric.compute()


def columns_of(
    model: Any,
    items: Sequence[dict[str, Any]],
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    predict: Predict,
) -> dict[str, list[Any]]:
    """Return pictures of some items: input, truth, and what a model finds with enough certainty."""
    model.eval()
    images = [picture(item["pixel_values"]) for item in items]
    truths = [_as_seen(item["labels"]) for item in items]
    found = predict(model, collate(list(items)), _sizes(items, "size"))
    return {
        "input": images,
        "truth": [_drawn(i, t) for i, t in zip(images, truths, strict=True)],
        "prediction": [_drawn(i, f) for i, f in zip(images, found, strict=True)],
    }


def _sizes(items: Sequence[dict[str, Any]], name: str) -> list[tuple[int, int]]:
    return [tuple(item["labels"][name].tolist()) for item in items]


def _as_seen(labels: dict[str, Tensor]) -> dict[str, Any]:
    """Return an item's labels in the frame of `pixel_values`, as `true_objects` would."""
    own = {name: value for name, value in labels.items() if not name.startswith("orig_")}
    return true_objects({**own, "orig_size": labels["size"]})


def _drawn(image: np.ndarray, objects: dict[str, Any]) -> ObjectPicture:
    arrays = {name: np.asarray(value) for name, value in objects.items() if name != "masks"}
    scores, size = arrays.get("scores"), image.shape[:2]
    kept = np.arange(len(arrays["labels"]))
    if scores is not None:
        kept = kept[scores >= DRAWN_SCORE]
    masks = objects.get("masks")
    if isinstance(masks, list):  # run lengths
        masks = np.array([decode_mask(masks[i], *size) for i in kept], bool).reshape(-1, *size)
    elif masks is not None:
        masks = np.asarray(masks)[kept]
    return ObjectPicture(
        image,
        arrays["labels"][kept],
        boxes=arrays["boxes"][kept].reshape(-1, 4) if masks is None else None,
        masks=masks,
        scores=None if scores is None else scores[kept],
    )


def draw(columns: Any, path: Path, class_names: list[str]) -> None:
    """Write columns of images and objects as a contact sheet."""
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    object_sheet(rows, list(columns), path, class_names=class_names)
