# SPDX-License-Identifier: Apache-2.0
"""Average precision of boxes and masks as COCO defines it, computed by faster-coco-eval.

Detections are compared per class: IoU thresholds .50 to .95 in steps of .05, recall at 101 points,
at most 100 detections per image and class. A class without ground truth is nan and not averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from sfa_peft.dense.coco_masks import coco_library
from sfa_peft.dense.metrics.accumulator import BatchMetric, Prediction
from sfa_peft.dense.metrics.instances import Instances, mask_size, read_instances
from sfa_peft.errors import SFAError

IouType = Literal["bbox", "segm"]
Objects = Sequence[Mapping[str, Any]]

AREAS = ("all", "small", "medium", "large")  # 0, 32² and 96² pixels part them
MAX_DETECTIONS = (1, 10, 100)


class CocoMetrics(BatchMetric):
    """Collect detections and ground truth; give it to Trainer as ``compute_metrics``.

    Set ``batch_eval_metrics=True`` in the training arguments. Outputs of a model must be
    post-processed first: ``convert`` does it.

    Scores that are exactly equal are ranked in the order in which they came, as in COCO's own
    code; otherwise the order of images and objects does not matter.

    Args:
        class_names: Name of class id 0, 1, ...
        iou_types: ``"bbox"``, ``"segm"`` or both.
        convert: Turns what Trainer passes into a pair of lists, predictions and ground truth, as
            in :meth:`update`. Without it ``predictions`` and ``label_ids`` are those lists.

    Raises:
        SFAError: If there are no names or one occurs twice, an IoU type is unknown, or
            faster-coco-eval is not installed.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        *,
        iou_types: Sequence[IouType] = ("bbox",),
        convert: Callable[[Any], tuple[Objects, Objects]] | None = None,
    ) -> None:
        if not class_names or len(set(class_names)) != len(class_names):
            raise SFAError(f"expected different class names, one at least, got {class_names}")
        if not iou_types or not set(iou_types) <= {"bbox", "segm"}:
            raise SFAError(f"iou_types must be 'bbox', 'segm' or both, got {iou_types}")
        coco_library()  # missing: say so before an epoch is trained
        self.class_names = tuple(class_names)
        self.iou_types: tuple[IouType, ...] = tuple(iou_types)
        self.convert = convert
        self.reset()

    def reset(self) -> None:
        """Forget every image."""
        self._images: list[tuple[Instances, Instances]] = []

    def update(self, predicted: Objects, labels: Objects) -> None:
        """Collect a batch of images; masks are kept run-length encoded.

        Args:
            predicted: One dict per image: ``scores`` ``(N,)``, ``labels`` ``(N,)``, ``boxes``
                ``(N, 4)`` left, top, right, bottom in pixels for ``"bbox"``, and ``masks``
                ``(N, H, W)`` for ``"segm"``; N may be 0. What
                ``post_process_object_detection(threshold=0)`` returns, or
                :func:`~sfa_peft.dense.metrics.instances.instances_from_segmentation`.
            labels: One dict per image: ``labels`` (or ``class_labels``), ``boxes`` and ``masks``
                likewise, and, if known, ``iscrowd`` and ``area`` ``(N,)``. Without ``area`` that
                of the mask, else of the box, sorts an object into small, medium or large.

        Raises:
            SFAError: If the numbers of images differ, or an object is malformed, of an unknown
                class, or a mask of another size than the label's.
        """
        if not isinstance(predicted, (list, tuple)) or not isinstance(labels, (list, tuple)):
            raise SFAError(
                "expected lists with a dict per image, got "
                f"{type(predicted).__name__} and {type(labels).__name__}; CocoMetrics(convert=...) "
                "post-processes what Trainer passes"
            )
        if len(predicted) != len(labels):
            raise SFAError(f"predictions of {len(predicted)} images, labels of {len(labels)}")
        batch = []
        for guess, truth in zip(predicted, labels, strict=True):
            number = len(self._images) + len(batch)
            pair = (
                self._read(guess, f"predictions of image {number}", True),
                self._read(truth, f"labels of image {number}", False),
            )
            sizes = {mask_size(side.masks) for side in pair} - {None}
            if len(sizes) > 1:
                raise SFAError(f"image {number}: predicted and true masks differ in size: {sizes}")
            batch.append(pair)
        self._images += batch

    def __call__(self, prediction: Prediction, compute_result: bool = True) -> dict[str, float]:
        """Collect one batch and, after the last, return the scores and start over.

        Args:
            prediction: What Trainer passes; goes through ``convert`` if there is one.
            compute_result: Whether this is the last batch.

        Returns:
            The scores as in :meth:`compute`, or an empty dict before the last batch.

        Raises:
            SFAError: As :meth:`update`.
        """
        if self.convert is not None:
            prediction = _Converted(*self.convert(prediction))
        return super().__call__(prediction, compute_result)

    def compute(self) -> dict[str, float]:
        """Return the scores of everything collected since the last reset.

        Returns:
            For each IoU type, in ``[0, 1]`` or nan without ground truth: ``bbox_map`` (mean over
            thresholds and classes), ``bbox_map_50``, ``bbox_map_75``, ``bbox_map_small``,
            ``bbox_map_medium``, ``bbox_map_large``; the mean recalls ``bbox_mar_1``,
            ``bbox_mar_10``, ``bbox_mar_100`` (detections per image) and ``bbox_mar_small``,
            ``..._medium``, ``..._large``; and ``bbox_ap_<name>`` of each class. Likewise
            ``segm_...``. ``images`` is the number of images.
        """
        scores: dict[str, float] = {}
        for iou_type in self.iou_types:
            scores.update(self._scores(iou_type))
        return {**scores, "images": len(self._images)}

    def _read(self, item: Mapping[str, Any], where: str, scored: bool) -> Instances:
        if not isinstance(item, Mapping):
            raise SFAError(f"{where}: expected a dict, got {type(item).__name__}")
        return read_instances(
            item,
            num_classes=len(self.class_names),
            iou_types=self.iou_types,
            where=where,
            scored=scored,
        )

    def _scores(self, iou_type: IouType) -> dict[str, float]:
        precision, recall = self._evaluate(iou_type)
        scores = {"map": _mean(precision[:, :, :, 0, -1])}
        for threshold, position in ((50, 0), (75, 5)):
            scores[f"map_{threshold}"] = _mean(precision[position, :, :, 0, -1])
        for position, area in enumerate(AREAS[1:], start=1):
            scores[f"map_{area}"] = _mean(precision[:, :, :, position, -1])
        for position, count in enumerate(MAX_DETECTIONS):
            scores[f"mar_{count}"] = _mean(recall[:, :, 0, position])
        for position, area in enumerate(AREAS[1:], start=1):
            scores[f"mar_{area}"] = _mean(recall[:, :, position, -1])
        for position, name in enumerate(self.class_names):
            scores[f"ap_{name}"] = _mean(precision[:, :, position, 0, -1])
        return {f"{iou_type}_{key}": value for key, value in scores.items()}

    def _evaluate(self, iou_type: IouType) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return precision ``(10, 101, C, 4, 3)`` and recall ``(10, C, 4, 3)``.

        The axes are thresholds, recalls, classes, areas and detections per image; -1 stands where
        a class has no ground truth.
        """
        library = coco_library()
        shape = (10, 101, len(self.class_names), len(AREAS), len(MAX_DETECTIONS))
        if not self._images:
            return np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0)
        truths: list[dict[str, Any]] = []
        guesses: list[dict[str, Any]] = []
        images = []
        for number, (guess, truth) in enumerate(self._images, start=1):
            height, width = mask_size(truth.masks) or mask_size(guess.masks) or (1, 1)
            images.append({"id": number, "height": height, "width": width})
            truths += truth.annotations(iou_type, number, len(truths) + 1)
            guesses += guess.annotations(iou_type, number, len(guesses) + 1)
        categories = [{"id": i, "name": name} for i, name in enumerate(self.class_names)]
        ground_truth = library.COCO(
            {"images": images, "annotations": truths, "categories": categories}
        )
        evaluation = library.COCOeval_faster(
            ground_truth, ground_truth.loadRes(guesses), iou_type, print_function=_silent
        )
        evaluation.params.maxDets = list(MAX_DETECTIONS)
        evaluation.evaluate()
        evaluation.accumulate()
        precision = np.asarray(evaluation.eval["precision"]).reshape(shape)
        recall = np.asarray(evaluation.eval["recall"]).reshape(shape[:1] + shape[2:])
        return precision, recall


class _Converted:
    """Predictions and ground truth where Trainer's would be."""

    def __init__(self, predictions: Objects, label_ids: Objects) -> None:
        self.predictions = predictions
        self.label_ids = label_ids


def _silent(*_: Any) -> None:
    """Take the place of the library's print."""


def _mean(values: NDArray[Any]) -> float:
    present = values[values > -1]
    return float(present.mean()) if present.size else math.nan
