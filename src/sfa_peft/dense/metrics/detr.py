# SPDX-License-Identifier: Apache-2.0
"""From what Trainer keeps of a DETR-like detector to the lists that CocoMetrics counts.

Such models learn boxes as centre, width and height in shares of the image; COCO wants corners in
pixels. Predictions and ground truth are scaled by the same size, so they cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from sfa_peft.dense.metrics.ground_truth import true_objects
from sfa_peft.errors import SFAError

Objects = list[dict[str, Any]]


def detr_outputs(outputs: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep class logits and boxes of a detector's outputs.

    Give it to Trainer as ``preprocess_logits_for_metrics``: the rest of the outputs, feature maps
    and losses of each layer, is large and of no use here.

    Args:
        outputs: The tuple that Trainer makes of DETR, Conditional, DAB or Deformable DETR, RT-DETR
            or D-FINE: logits ``(B, Q, C)``, directly followed by boxes ``(B, Q, 4)``.
        labels: Not used.

    Returns:
        Logits ``(B, Q, C)`` and boxes ``(B, Q, 4)``.

    Raises:
        SFAError: If no such pair is there.
    """
    for logits, boxes in pairwise(outputs):
        if not (isinstance(logits, torch.Tensor) and isinstance(boxes, torch.Tensor)):
            continue
        if logits.ndim == 3 and boxes.shape == (*logits.shape[:2], 4):
            return logits, boxes
    raise SFAError(
        "found no logits (B, Q, C) with boxes (B, Q, 4) behind them among the outputs; is this a "
        "detector?"
    )


def detr_results(
    image_processor: Any, *, threshold: float = 0.0
) -> Callable[[Any], tuple[Objects, Objects]]:
    """Make the ``convert`` of :class:`~sfa_peft.dense.metrics.coco.CocoMetrics` for a detector.

    Args:
        image_processor: The model's processor; its ``post_process_object_detection`` makes scores,
            labels and corners.
        threshold: Detections of a lower score are dropped; AP wants them all.

    Returns:
        A function of ``predictions`` as :func:`detr_outputs` leaves them and ``inputs["labels"]``:
        one dict per image with ``class_labels`` ``(N,)``, ``boxes`` ``(N, 4)`` (centre, width,
        height in shares), ``orig_size`` (height, width) and perhaps ``iscrowd`` ``(N,)``, as the
        processor makes them. Trainer passes ``inputs`` if ``include_for_metrics=["inputs"]``.

        It raises SFAError without ``inputs``: of a last batch of n images Trainer keeps the first
        n rows of *every* tensor in ``label_ids``, so objects of an image silently go missing. It
        also raises if the numbers of images differ, as they do on several processes: evaluate on
        one.
    """

    def convert(prediction: Any) -> tuple[Objects, Objects]:
        logits, boxes = (torch.as_tensor(part).cpu() for part in prediction.predictions)
        labels = _labels(prediction)
        if len(labels) != len(logits):
            raise SFAError(
                f"outputs of {len(logits)} images, labels of {len(labels)}; evaluate detectors on "
                "one process"
            )
        truths = [true_objects(label) for label in labels]
        sizes = [(int(label["orig_size"][0]), int(label["orig_size"][1])) for label in labels]
        outputs = SimpleNamespace(logits=logits.float(), pred_boxes=boxes.float())
        results = image_processor.post_process_object_detection(
            outputs, threshold=threshold, target_sizes=sizes
        )
        return results, truths

    return convert


def _labels(prediction: Any) -> Sequence[Mapping[str, Any]]:
    inputs = getattr(prediction, "inputs", None)
    if not isinstance(inputs, Mapping) or "labels" not in inputs:
        raise SFAError(
            "no inputs['labels']; set include_for_metrics=['inputs'] in the training arguments: "
            "Trainer cuts objects out of the label_ids of the last batch"
        )
    return inputs["labels"]
