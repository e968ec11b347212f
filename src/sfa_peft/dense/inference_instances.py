# SPDX-License-Identifier: Apache-2.0
"""Instances from the class and mask queries of Mask2Former and MaskFormer, as their own code does.

Mask2Former (Cheng et al., 2022) enlarges mask logits to the size of the image before it thresholds
them. ``post_process_instance_segmentation`` of transformers thresholds on a grid of 384 x 384 and
enlarges what is left by the nearest neighbour: other masks, other scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sfa_peft.dense.coco_masks import encode_masks
from sfa_peft.dense.inference import Size, resize
from sfa_peft.errors import SFAError

# Mask logits that are enlarged at a time; with what is made of them, some 60 MB.
CHUNK = 2**22


@torch.no_grad()
def instances_from_queries(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    sizes: Sequence[Size],
    *,
    pixel_mask: torch.Tensor | None = None,
    top: int = 100,
    threshold: float = 0.0,
    encode: bool = False,
) -> list[dict[str, Any]]:
    """Return scored masks at the size of each image.

    Of all pairs of query and class the ``top`` most probable are kept. A mask is where its logit,
    bilinearly enlarged (``align_corners=False``), is above 0; a score is the class's probability
    times the mean of the mask's probability over the mask's pixels.

    A few queries are enlarged at a time, 4 million pixels or one query, so memory does not grow
    with their number; with ``encode`` the result is small too.

    Args:
        class_logits: ``(B, Q, C + 1)``, "no object" last, any floating dtype and device.
        mask_logits: ``(B, Q, h, w)``.
        sizes: Height and width, in pixels, at which the masks of each image are wanted: the
            original image's for scores.
        pixel_mask: Which pixels of the model's input ``(B, H, W)`` belong to the image, as the
            collators make it. Then logits are enlarged to H x W, what lies beyond the image is cut
            off, and the rest is brought to ``sizes``: Mask2Former's own two steps. Without it
            logits are taken to cover the image alone and are enlarged in one step.
        top: Instances per image at most; 100 in Mask2Former and in COCO's evaluation.
        threshold: Instances of a lower score are left out; AP wants them all.
        encode: Whether to return masks as COCO's run lengths; needs faster-coco-eval.

    Returns:
        For each image, by falling score: ``scores`` float64 ``(N,)``, ``labels`` int64 ``(N,)``
        and ``masks`` bool ``(N, H, W)`` or N run-length encodings, all on the CPU. An empty mask,
        which counts for nothing, is left out.

    Raises:
        SFAError: If shapes or numbers of images disagree, ``top`` or a size is not positive, or
            faster-coco-eval is wanted and not installed.
    """
    _check(class_logits, mask_logits, sizes, pixel_mask, top)
    shares = class_logits.float().softmax(-1)[..., :-1]
    insides = [None] * len(sizes) if pixel_mask is None else list(pixel_mask)
    return [
        _of_one_image(of_classes, logits, _steps(size, inside), top, threshold, encode)
        for of_classes, logits, size, inside in zip(
            shares, mask_logits, sizes, insides, strict=True
        )
    ]


_Step = tuple[Size, Size]  # to enlarge to, and what to keep of that, from the top left


def _steps(size: Size, inside: torch.Tensor | None) -> list[_Step]:
    if inside is None:
        return [(size, size)]
    rows, columns = int(inside.any(1).sum()), int(inside.any(0).sum())
    if not rows:
        raise SFAError("pixel_mask: an image without any pixel")
    return [((inside.shape[0], inside.shape[1]), (rows, columns)), (size, size)]


def _of_one_image(
    shares: torch.Tensor,
    logits: torch.Tensor,
    steps: list[_Step],
    top: int,
    threshold: float,
    encode: bool,
) -> dict[str, Any]:
    best, pairs = shares.flatten().topk(min(top, shares.numel()))
    # Several pairs may share a query: each is enlarged once.
    queries, place = (pairs // shares.shape[1]).unique(return_inverse=True)
    certainty, masks = _masks(logits, queries, steps, encode)
    scores = best * certainty[place]
    # A score is 0 where the mask is empty.
    kept = ((scores > 0) & (scores >= threshold)).nonzero()[:, 0]
    order = kept[scores[kept].argsort(descending=True, stable=True)]
    chosen = [masks[i] for i in place[order].tolist()]
    return {
        "scores": scores[order].cpu().numpy().astype(np.float64),
        "labels": (pairs[order] % shares.shape[1]).cpu().numpy(),
        "masks": chosen if encode else np.array(chosen, bool).reshape(-1, *steps[-1][0]),
    }


def _masks(
    logits: torch.Tensor, queries: torch.Tensor, steps: list[_Step], encode: bool
) -> tuple[torch.Tensor, list[Any]]:
    """Return the mean probability in each query's mask, and the masks, a few at a time."""
    certainty, masks = [], []
    largest = max(size[0] * size[1] for size, _ in steps)
    for part in queries.split(max(1, CHUNK // largest)):
        full = logits[part][None]
        for size, (rows, columns) in steps:
            full = resize(full, size)[..., :rows, :columns]
        mask = full[0] > 0
        sums = full[0].sigmoid().mul_(mask).sum((1, 2))
        certainty.append(sums / (mask.sum((1, 2)) + 1e-6))
        masks += encode_masks(mask.cpu().numpy()) if encode else list(mask.cpu().numpy())
    return torch.cat(certainty), masks


def _check(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    sizes: Sequence[Size],
    pixel_mask: torch.Tensor | None,
    top: int,
) -> None:
    shapes = tuple(class_logits.shape), tuple(mask_logits.shape)
    if class_logits.ndim != 3 or mask_logits.ndim != 4 or shapes[0][:2] != shapes[1][:2]:
        raise SFAError(
            "expected class logits (B, Q, C + 1) and mask logits (B, Q, h, w), got "
            f"{shapes[0]} and {shapes[1]}"
        )
    if class_logits.shape[-1] < 2 or top < 1:
        raise SFAError(
            f"need a class beside 'no object' and top of 1 or more, got {shapes[0]} and {top}"
        )
    if len(sizes) != len(class_logits) or any(min(size) < 1 or len(size) != 2 for size in sizes):
        raise SFAError(
            f"expected height and width of {len(class_logits)} images, got {list(sizes)[:8]}"
        )
    if pixel_mask is not None and (pixel_mask.ndim != 3 or len(pixel_mask) != len(class_logits)):
        raise SFAError(
            f"pixel_mask: expected ({len(class_logits)}, H, W), got {tuple(pixel_mask.shape)}"
        )
