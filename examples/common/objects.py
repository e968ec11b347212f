# SPDX-License-Identifier: Apache-2.0
"""Detected objects: evaluation by COCO's rules, and pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.items import picture
from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.dense.pictures.objects import ObjectPicture, object_sheet

DRAWN_SCORE = 0.5  # predictions below are left out of pictures

Predict = Callable[[Any, dict[str, Any]], list[dict[str, Any]]]


def corners(labels: dict[str, Tensor]) -> Tensor:
    """Return an item's boxes as left, top, right and bottom in pixels, float32 `(N, 4)`."""
    x, y, width, height = labels["boxes"].unbind(-1)
    rows, columns = labels["size"].tolist()
    edges = torch.stack((x - width / 2, y - height / 2, x + width / 2, y + height / 2), -1)
    return edges * torch.tensor((columns, rows, columns, rows))


def true_objects(labels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an item's labels as `CocoMetrics` takes them."""
    named = {"labels": labels["class_labels"], "boxes": corners(labels)}
    kept = {name: labels[name] for name in ("area", "iscrowd", "masks") if name in labels}
    return {**named, **kept}


def evaluate(
    model: Any,
    data: Dataset[dict[str, Any]],
    metric: CocoMetrics,
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]],
    predict: Predict,
    num_workers: int = 0,
) -> dict[str, float]:
    """Return COCO's scores of a model.

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
        metric.update(predict(model, collate(items)), truths)
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
    truths = [true_objects(item["labels"]) for item in items]
    found = predict(model, collate(list(items)))
    return {
        "input": images,
        "truth": [_drawn(i, t) for i, t in zip(images, truths, strict=True)],
        "prediction": [_drawn(i, f) for i, f in zip(images, found, strict=True)],
    }


def _drawn(image: np.ndarray, objects: dict[str, Any]) -> ObjectPicture:
    arrays = {name: np.asarray(value) for name, value in objects.items()}
    scores = arrays.get("scores")
    kept = slice(None) if scores is None else scores >= DRAWN_SCORE
    masks = arrays.get("masks")
    if masks is not None:
        # Where nothing was found, masks have no size.
        masks = masks[kept].astype(bool) if len(masks) else np.zeros((0, *image.shape[:2]), bool)
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
