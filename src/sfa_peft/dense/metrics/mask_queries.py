# SPDX-License-Identifier: Apache-2.0
"""From what Trainer keeps of MaskFormer or Mask2Former to the lists that CocoMetrics counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from sfa_peft.dense.metrics.instances import instances_from_segmentation
from sfa_peft.errors import SFAError

Objects = list[dict[str, Any]]


def mask_query_outputs(outputs: Any, labels: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep class and mask queries of a model's outputs.

    Give it to Trainer as ``preprocess_logits_for_metrics``: the rest, such as feature maps of
    every layer, is large and of no use here.

    Args:
        outputs: The tuple that Trainer makes of MaskFormer's or Mask2Former's outputs.
        labels: Not used.

    Returns:
        Class logits ``(B, Q, C + 1)`` and mask logits ``(B, Q, h, w)``.

    Raises:
        SFAError: If no such pair is there.
    """
    for classes, masks in pairwise(outputs):
        if not (isinstance(classes, torch.Tensor) and isinstance(masks, torch.Tensor)):
            continue
        if classes.ndim == 3 and masks.ndim == 4 and masks.shape[:2] == classes.shape[:2]:
            return classes, masks
    raise SFAError(
        "found no class queries (B, Q, C + 1) with mask queries (B, Q, h, w) behind them among "
        "the outputs; is this a MaskFormer?"
    )


def mask_query_results(
    image_processor: Any, *, threshold: float = 0.0
) -> Callable[[Any], tuple[Objects, Objects]]:
    """Make the ``convert`` of :class:`~sfa_peft.dense.metrics.coco.CocoMetrics` for mask queries.

    Args:
        image_processor: The model's processor; its ``post_process_instance_segmentation`` makes
            scores, labels and masks at the size of the true masks.
        threshold: Instances of a lower score are dropped; AP wants them all.

    Returns:
        A function of ``predictions`` as :func:`mask_query_outputs` leaves them and, from
        ``inputs``, ``mask_labels`` and ``class_labels``: for each image ``(N, H, W)`` of 0 and 1
        and ``(N,)``. Trainer passes ``inputs`` if ``include_for_metrics=["inputs"]``.

        It raises SFAError without ``inputs``, because Trainer cuts instances out of ``label_ids``
        as :func:`~sfa_peft.dense.metrics.detr.detr_results` explains, and if the numbers of images
        differ, as they do on several processes: evaluate on one.
    """

    def convert(prediction: Any) -> tuple[Objects, Objects]:
        classes, masks = (torch.as_tensor(part).cpu().float() for part in prediction.predictions)
        true_classes, true_masks = _labels(prediction)
        if not len(true_classes) == len(true_masks) == len(classes):
            raise SFAError(
                f"outputs of {len(classes)} images, labels of {len(true_classes)} and masks of "
                f"{len(true_masks)}; evaluate instances on one process"
            )
        outputs = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
        results = image_processor.post_process_instance_segmentation(
            outputs,
            threshold=threshold,
            target_sizes=[tuple(mask.shape[-2:]) for mask in true_masks],
            return_binary_maps=True,
        )
        truth = [
            {"class_labels": labels, "masks": masks}
            for labels, masks in zip(true_classes, true_masks, strict=True)
        ]
        return [instances_from_segmentation(result) for result in results], truth

    return convert


def _labels(prediction: Any) -> tuple[Any, Any]:
    inputs = getattr(prediction, "inputs", None)
    if not isinstance(inputs, Mapping) or not {"class_labels", "mask_labels"} <= set(inputs):
        raise SFAError(
            "no inputs['class_labels'] and ['mask_labels']; set include_for_metrics=['inputs'] in "
            "the training arguments: Trainer cuts instances out of the label_ids of the last batch"
        )
    return inputs["class_labels"], inputs["mask_labels"]
