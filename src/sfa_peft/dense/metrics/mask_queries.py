# SPDX-License-Identifier: Apache-2.0
"""From what Trainer keeps of MaskFormer or Mask2Former to the lists that CocoMetrics counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from sfa_peft.dense.inference_instances import instances_from_queries
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
    *, top: int = 100, threshold: float = 0.0
) -> Callable[[Any], tuple[Objects, Objects]]:
    """Make the ``convert`` of :class:`~sfa_peft.dense.metrics.coco.CocoMetrics` for mask queries.

    Args:
        top: Instances per image at most.
        threshold: Instances of a lower score are dropped; AP wants them all.

    Returns:
        A function of ``predictions`` as :func:`mask_query_outputs` leaves them and, from
        ``inputs``, ``mask_labels`` and ``class_labels``: for each image ``(N, H, W)`` of 0 and 1
        and ``(N,)``; and ``pixel_mask``, if there is one: what it leaves out of both is not
        counted. Trainer passes ``inputs`` if ``include_for_metrics=["inputs"]``.

        Masks are compared, and objects called small or large, at the size of ``mask_labels``: that
        of the model's input. For the image's own frame, in which COCO counts, run
        :func:`~sfa_peft.dense.inference_instances.instances_from_queries` in a loop, with
        :func:`~sfa_peft.dense.metrics.ground_truth.true_objects`.

        It raises SFAError without ``inputs``, because Trainer cuts instances out of ``label_ids``
        as :func:`~sfa_peft.dense.metrics.detr.detr_results` explains, and if the numbers of images
        differ, as they do on several processes: evaluate on one.
    """

    def convert(prediction: Any) -> tuple[Objects, Objects]:
        classes, masks = (torch.as_tensor(part).cpu() for part in prediction.predictions)
        true_classes, true_masks = _labels(prediction)
        if not len(true_classes) == len(true_masks) == len(classes):
            raise SFAError(
                f"outputs of {len(classes)} images, labels of {len(true_classes)} and masks of "
                f"{len(true_masks)}; evaluate instances on one process"
            )
        inside = prediction.inputs.get("pixel_mask")
        inside = None if inside is None else torch.as_tensor(inside).cpu()
        sizes = [(int(mask.shape[-2]), int(mask.shape[-1])) for mask in true_masks]
        if inside is not None:
            sizes = [(int(one.any(1).sum()), int(one.any(0).sum())) for one in inside]
        found = instances_from_queries(
            classes, masks, sizes, pixel_mask=inside, top=top, threshold=threshold, encode=True
        )
        truth = [
            {"class_labels": labels, "masks": masks[..., :rows, :columns]}
            for labels, masks, (rows, columns) in zip(true_classes, true_masks, sizes, strict=True)
        ]
        return found, truth

    return convert


def _labels(prediction: Any) -> tuple[Any, Any]:
    inputs = getattr(prediction, "inputs", None)
    if not isinstance(inputs, Mapping) or not {"class_labels", "mask_labels"} <= set(inputs):
        raise SFAError(
            "no inputs['class_labels'] and ['mask_labels']; set include_for_metrics=['inputs'] in "
            "the training arguments: Trainer cuts instances out of the label_ids of the last batch"
        )
    return inputs["class_labels"], inputs["mask_labels"]
