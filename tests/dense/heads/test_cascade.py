# SPDX-License-Identifier: Apache-2.0
"""Cascade heads against a cascade in plain loops, which shares only pools and layers with them."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sfa_peft.dense.heads.rcnn import RCNNConfig

detection = pytest.importorskip("torchvision.models.detection")
from sfa_peft.dense.heads.cascade import CascadeRoIHeads  # noqa: E402

SHAPES = [(64, 64), (48, 64)]
WEIGHTS = [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
THRESHOLDS = [0.5, 0.6, 0.7]


def cascade(masks: bool = True) -> CascadeRoIHeads:
    torch.manual_seed(0)
    heads = CascadeRoIHeads(RCNNConfig(hidden_size=8, num_labels=2, masks=masks))
    for name, parameter in heads.named_parameters():
        if "bbox_pred" in name or "cls_score" in name:
            torch.nn.init.normal_(parameter, std=0.4)
    return heads


def scene() -> tuple[dict[str, Tensor], list[Tensor], list[dict[str, Tensor]]]:
    """Maps, proposals near the true boxes and elsewhere, and what is true."""
    generator = torch.Generator().manual_seed(3)
    maps = {
        name: torch.randn(2, 8, 64 // stride, 64 // stride, generator=generator)
        for name, stride in zip(("0", "1", "2", "3", "pool"), (4, 8, 16, 32, 64), strict=True)
    }
    boxes = torch.tensor([[[4.0, 6, 30, 40], [34, 10, 60, 30]], [[8, 8, 28, 40], [30, 5, 50, 44]]])
    proposals, truth = [], []
    for true in boxes:
        near = true.repeat(6, 1) + torch.randn(12, 4, generator=generator) * 2.5
        corner = torch.rand(8, 2, generator=generator) * 30
        far = torch.cat((corner, corner + 4 + 12 * torch.rand(8, 2, generator=generator)), 1)
        proposals.append(torch.cat((near, far)).clamp(0, 48))
        masks = torch.zeros(2, 64, 64, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, true.int().tolist(), strict=True):
            mask[top + 2 : bottom, left : right - 3] = True
        truth.append({"boxes": true, "labels": torch.tensor([1, 2]), "masks": masks})
    return maps, proposals, truth


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return both / (sum(areas) - both)


def moved(box: list[float], delta: list[float], weights: Any, shape: Any) -> list[float]:
    width, height = box[2] - box[0], box[3] - box[1]
    dx, dy, dw, dh = (d / w for d, w in zip(delta, weights, strict=True))
    most = math.log(1000 / 16)
    x, y = box[0] + width / 2 + dx * width, box[1] + height / 2 + dy * height
    w, h = width * math.exp(min(dw, most)) / 2, height * math.exp(min(dh, most)) / 2
    edges = zip((x - w, y - h, x + w, y + h), (shape[1], shape[0]) * 2, strict=True)
    return [min(max(edge, 0.0), float(most)) for edge, most in edges]


def difference(true: list[float], box: list[float], weights: Any) -> list[float]:
    sizes = [(c[2] - c[0], c[3] - c[1]) for c in (box, true)]
    centres = [((c[0] + c[2]) / 2, (c[1] + c[3]) / 2) for c in (box, true)]
    shift = [(centres[1][i] - centres[0][i]) / sizes[0][i] for i in range(2)]
    growth = [math.log(sizes[1][i] / sizes[0][i]) for i in range(2)]
    return [d * w for d, w in zip(shift + growth, weights, strict=True)]


def outputs(stage: Any, maps: dict[str, Tensor], boxes: list[list[list[float]]]) -> Any:
    """Logits and deltas of each box of each image."""
    tensors = [torch.tensor(of_image) for of_image in boxes]
    features = stage.box_head(stage.box_roi_pool(maps, tensors, SHAPES))
    counts = [len(of_image) for of_image in boxes]
    logits = stage.box_predictor.cls_score(features).split(counts)
    return logits, stage.box_predictor.bbox_pred(features).split(counts)


def refined(boxes: Any, deltas: Any, weights: Any) -> list[list[list[float]]]:
    return [
        [moved(b, d, weights, shape) for b, d in zip(of_image, steps.tolist(), strict=True)]
        for of_image, steps, shape in zip(boxes, deltas, SHAPES, strict=True)
    ]


def test_the_losses_are_those_of_a_cascade_in_plain_loops() -> None:
    heads = cascade().train()
    maps, proposals, truth = scene()

    found, losses = heads(maps, list(proposals), SHAPES, truth)

    assert found == []
    boxes = [of_image.tolist() for of_image in proposals]
    seen = []
    for number, stage in enumerate(heads.stages):
        classes: list[list[int]] = []
        targets: list[list[Any]] = []
        boxes = [b + t["boxes"].tolist() for b, t in zip(boxes, truth, strict=True)]
        for of_image, true in zip(boxes, truth, strict=True):
            best = [
                max((overlap(t, b), i) for i, t in enumerate(true["boxes"].tolist()))
                for b in of_image
            ]
            is_object = [share >= THRESHOLDS[number] for share, _ in best]
            classes.append([i + 1 if ok else 0 for (_, i), ok in zip(best, is_object, strict=True)])
            targets.append(
                [
                    difference(true["boxes"][i].tolist(), b, WEIGHTS[number]) if ok else None
                    for b, (_, i), ok in zip(of_image, best, is_object, strict=True)
                ]
            )
        seen.append(sum(c > 0 for of_image in classes for c in of_image))
        logits, deltas = outputs(stage, maps, boxes)
        flat = [c for of_image in classes for c in of_image]
        entropy = -sum(
            row.log_softmax(0)[c] for row, c in zip(torch.cat(logits), flat, strict=True)
        )
        weight = 0.5**number
        wanted = weight * entropy / len(flat)
        torch.testing.assert_close(losses[f"loss_classifier_{number}"], wanted)
        distance = torch.zeros(())
        for delta, target in zip(torch.cat(deltas), chain(*targets), strict=True):
            for difference_ in () if target is None else (delta - torch.tensor(target)).abs():
                is_near = difference_ < 1 / 9
                distance += difference_**2 * 4.5 if is_near else difference_ - 1 / 18
        wanted = weight * distance / len(flat)
        torch.testing.assert_close(losses[f"loss_box_reg_{number}"], wanted)
        if number == 0:
            wanted = mask_loss(stage, maps, boxes, classes, truth)
            torch.testing.assert_close(losses["loss_mask"], wanted)
        boxes = refined(boxes, deltas, WEIGHTS[number])
    assert min(seen) > 4  # the true boxes, and others
    assert len(losses) == 7


def mask_loss(stage: Any, maps: Any, boxes: Any, classes: Any, truth: Any) -> Tensor:
    """Of each object's box the mask of its class, against what is true there."""
    total, places = torch.zeros(()), 0
    chosen = [
        [(b, c) for b, c in zip(of_image, of_classes, strict=True) if c]
        for of_image, of_classes in zip(boxes, classes, strict=True)
    ]
    inside = [torch.tensor([b for b, _ in of_image]) for of_image in chosen]
    logits = stage.mask_predictor(stage.mask_head(stage.mask_roi_pool(maps, inside, SHAPES)))
    rows = iter(logits)
    for of_image, true in zip(chosen, truth, strict=True):
        for box, class_id in of_image:
            whole = true["masks"][class_id - 1][None, None].float()  # one object of a class
            target = detection.roi_heads.roi_align(whole, [torch.tensor([box])], (28, 28), 1.0)
            row = next(rows)[class_id]
            total = total + functional.binary_cross_entropy_with_logits(
                row, target[0, 0], reduction="sum"
            )
            places += 28**2
    return total / places


def test_objects_have_the_mean_score_of_three_stages_and_the_last_ones_box() -> None:
    heads = cascade().eval()
    maps, proposals, _ = scene()

    with torch.no_grad():
        found, losses = heads(maps, list(proposals), SHAPES)
        boxes = [of_image.tolist() for of_image in proposals]
        shares = []
        for number, stage in enumerate(heads.stages):
            logits, deltas = outputs(stage, maps, boxes)
            shares.append([of_image.softmax(1) for of_image in logits])
            boxes = refined(boxes, deltas, WEIGHTS[number])

    assert losses == {}
    for image, objects in enumerate(found):
        mean = sum(of_stage[image] for of_stage in shares) / 3
        kept: list[tuple[float, int, list[float]]] = []
        for class_id in (1, 2):
            order = sorted(range(len(mean)), key=lambda i: -float(mean[i, class_id]))
            taken: list[list[float]] = []
            for index in order:
                box, score = boxes[image][index], float(mean[index, class_id])
                is_small = min(box[2] - box[0], box[3] - box[1]) < 0.01
                if score > 0.05 and not is_small and all(overlap(box, t) <= 0.5 for t in taken):
                    taken.append(box)
                    kept.append((score, class_id, box))
        kept.sort(key=lambda one: -one[0])
        assert len(kept) > 4
        assert objects["labels"].tolist() == [class_id for _, class_id, _ in kept]
        scores = torch.tensor([score for score, _, _ in kept])
        torch.testing.assert_close(objects["scores"], scores, atol=1e-6, rtol=0)
        wanted = torch.tensor([box for _, _, box in kept])
        torch.testing.assert_close(objects["boxes"], wanted, atol=1e-3, rtol=0)


def test_masks_are_of_the_last_boxes_and_their_class() -> None:
    heads = cascade().eval()
    maps, proposals, _ = scene()
    with torch.no_grad():
        found, _ = heads(maps, list(proposals), SHAPES)
        first = heads.stages[0]
        boxes = [one["boxes"] for one in found]
        pooled = first.mask_roi_pool(maps, boxes, SHAPES)
        logits = first.mask_predictor(first.mask_head(pooled)).split([len(b) for b in boxes])

    for one, of_image in zip(found, logits, strict=True):
        for mask, logit, class_id in zip(one["masks"], of_image, one["labels"], strict=True):
            torch.testing.assert_close(mask[0], logit[class_id].sigmoid())


def test_without_proposals_nothing_is_found_and_without_masks_there_are_none() -> None:
    maps, _, _ = scene()

    found, _ = cascade(masks=False).eval()(maps, [torch.zeros(0, 4)] * 2, SHAPES)

    assert [sorted(one) for one in found] == [["boxes", "labels", "scores"]] * 2
    assert all(one["boxes"].shape == (0, 4) for one in found)


def test_an_image_without_objects_is_all_background() -> None:
    maps, proposals, _ = scene()
    heads = cascade().train()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    nothing["masks"] = torch.zeros(0, 64, 64, dtype=torch.bool)

    _, losses = heads(maps, list(proposals), SHAPES, [nothing, nothing])
    sum(losses.values()).backward()

    assert [float(losses[f"loss_box_reg_{i}"].detach()) for i in range(3)] == [0.0] * 3
    assert float(losses["loss_mask"].detach()) == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in heads.parameters())
