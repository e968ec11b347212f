# SPDX-License-Identifier: Apache-2.0
"""Detected objects: evaluation by COCO's rules, and pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.arguments import SharedArguments
from common.augmented import AugmentedTrainer
from common.data import Data, load_pairs
from common.items import picture
from sfa_peft.dense import (
    CocoMetrics,
    ObjectPicture,
    ObjectResize,
    ObjectScaleCrop,
    Preprocessing,
    TransformedSplit,
    decode_mask,
    object_sheet,
    true_objects,
)

DRAWN_SCORE = 0.5  # predictions below are left out of pictures

# Of a model, a batch and the height and width to come out at: the objects in each image.
Predict = Callable[[Any, dict[str, Any], list[tuple[int, int]]], list[dict[str, Any]]]
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass
class ObjectArguments(SharedArguments):
    """Options of tasks with objects: they are trained longer, on fewer images a step."""

    max_steps: int = field(default=1200, metadata={"help": "Update steps, 2 or more."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Images per step and device."}
    )
    train_scale: list[float] = field(
        default_factory=lambda: [0.8, 1.6],
        metadata={"help": "Range of the random scale of your images; 1 just fits the crop."},
    )


def load_objects(task: str, args: SharedArguments) -> Data:
    """Return rendered scenes, or the user's data cropped and augmented.

    Args:
        task: `detection` or `instances`.
        args: The run's arguments.
    """
    pairs = load_pairs(task, args)
    plain = ObjectResize(tuple(args.eval_size))
    if args.dataset_name is None:  # scenes are all different
        augment = ObjectScaleCrop(tuple(args.image_size), scale=(1.0, 1.0), jitter=0.0)
    else:
        augment = ObjectScaleCrop(tuple(args.image_size), scale=tuple(args.train_scale))
    return Data(
        TransformedSplit(pairs.train, augment, seed=args.seed),
        TransformedSplit(pairs.evaluation, plain),
        pairs.class_names,
    )


def preprocessing(args: SharedArguments) -> Preprocessing:
    """Return what `load_objects` does with images to evaluate on."""
    return Preprocessing("stretch", tuple(args.eval_size))


@dataclass
class ObjectScoring:
    """COCO's scores, counted after training, and pictures of objects.

    Attributes:
        headers: Columns of the table: header to key of the scores.
        class_names: Names of the classes.
        collate: Makes a batch of items.
        predict: Returns the objects in each image of a batch, for `CocoMetrics.update`.
        iou_types: What is counted: `bbox` or `segm`.
        label_names: Keys of a batch that are labels.
        num_workers: Processes that load data.
    """

    headers: dict[str, str]
    class_names: list[str]
    collate: Collate
    predict: Predict
    iou_types: tuple[str, ...] = ("bbox",)
    label_names: tuple[str, ...] = ("labels",)
    num_workers: int = 0

    def __post_init__(self) -> None:
        self.metric = CocoMetrics(self.class_names, iou_types=self.iou_types)
        self.sheet = partial(object_sheet, class_names=self.class_names)

    def trainer_options(self, data: Data) -> dict[str, Any]:
        """Return what `make_trainer` is told of the task."""
        return {"collator": self.collate, "label_names": self.label_names}

    def evaluate(
        self, trainer: AugmentedTrainer, data: Dataset[dict[str, Any]]
    ) -> dict[str, float]:
        """Return COCO's scores of a trained model."""
        model, workers = trainer.model, self.num_workers
        return evaluate(model, data, self.metric, self.collate, self.predict, workers)

    def columns(self, model: Any, items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
        """Return pictures of some items: input, truth and prediction."""
        return columns_of(model, items, self.collate, self.predict)


def evaluate(
    model: Any,
    data: Dataset[dict[str, Any]],
    metric: CocoMetrics,
    collate: Collate,
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
    collate: Collate,
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
        crowds=arrays["iscrowd"][kept].astype(bool) if "iscrowd" in arrays else None,
    )
