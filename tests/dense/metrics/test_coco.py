# SPDX-License-Identifier: Apache-2.0
"""COCO average precision against greedy matching written out, pycocotools, and on bad input."""

from __future__ import annotations

import contextlib
import io
import math
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfa_peft.dense.metrics.coco import CocoMetrics
from sfa_peft.errors import SFAError
from tests.processes import run_code

pytest.importorskip("faster_coco_eval")

NAMES = ("cat", "dog")
Image = tuple[dict[str, Any], dict[str, Any]]  # predictions, ground truth
THRESHOLDS = [0.5 + 0.05 * i for i in range(10)]


def reference_iou(a: np.ndarray, b: np.ndarray) -> float:
    """IoU of two boxes (corners) or two masks."""
    if a.ndim == 2:
        return float((a & b).sum() / max((a | b).sum(), 1))
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (areas[0] + areas[1] - width * height)


def reference_matches(image: Image, label: int, threshold: float, shape: str) -> list[Any]:
    """(score, hit) of each detection of a class: the best free object of IoU >= threshold."""
    guesses, truths = image
    order = [i for i in np.argsort(-guesses["scores"]) if guesses["labels"][i] == label]
    free = [i for i in range(len(truths["labels"])) if truths["labels"][i] == label]
    matches = []
    for i in order:
        overlaps = [(reference_iou(guesses[shape][i], truths[shape][j]), j) for j in free]
        overlap, best = max(overlaps, default=(0.0, -1))
        hit = overlap >= threshold - 1e-12
        if hit:
            free.remove(best)
        matches.append((float(guesses["scores"][i]), hit))
    return matches


def reference_ap(images: list[Image], label: int, threshold: float, shape: str = "boxes") -> float:
    """Area below the precision envelope at 101 recalls; nan without ground truth."""
    objects = sum(int((truth["labels"] == label).sum()) for _, truth in images)
    if not objects:
        return math.nan
    matches = [m for image in images for m in reference_matches(image, label, threshold, shape)]
    matches.sort(key=lambda match: -match[0])
    points = []
    hits = 0
    for rank, (_, hit) in enumerate(matches, start=1):
        hits += hit
        points.append((hits / objects, hits / rank))
    precisions = []
    for step in range(101):
        # COCO's recall points come from linspace; compare with a margin for their rounding.
        reached = [p for recall, p in points if recall >= step / 100 - 1e-12]
        precisions.append(max(reached, default=0.0))
    return sum(precisions) / 101


def reference_table(images: list[Image], shape: str) -> np.ndarray:
    """AP of each class (rows) at each threshold (columns)."""
    return np.array([[reference_ap(images, c, t, shape) for t in THRESHOLDS] for c in range(2)])


def mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if present.size else math.nan


def rectangle(box: np.ndarray, size: int = 24) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    left, top, right, bottom = box.astype(int)
    mask[top:bottom, left:right] = True
    return mask


def objects(boxes: list[list[int]], labels: list[int]) -> dict[str, Any]:
    corners = np.array(boxes, np.float64).reshape(-1, 4)
    masks = np.array([rectangle(box) for box in corners], bool).reshape(-1, 24, 24)
    return {"boxes": corners, "labels": np.array(labels, np.int64), "masks": masks}


@st.composite
def scenes(draw: st.DrawFn) -> list[Image]:
    """Images with a few objects, detections near some of them, and scores all different."""
    side, start = st.integers(4, 10), st.integers(0, 12)
    box = st.builds(lambda x, y, w, h: [x, y, x + w, y + h], start, start, side, side)
    label = st.integers(0, 1)
    images = []
    total = 0
    for _ in range(draw(st.integers(1, 4))):
        truths = draw(st.lists(st.tuples(box, label), max_size=4))
        near = [
            ([c + draw(st.integers(-1, 1)) for c in corners], which)
            for corners, which in truths
            if draw(st.booleans())
        ]
        guesses = [
            ([max(c, 0) for c in corners], which)
            for corners, which in near + draw(st.lists(st.tuples(box, label), max_size=2))
        ]
        images.append((objects(*_split(guesses)), objects(*_split(truths))))
        total += len(guesses)
    scores = draw(st.permutations(range(1, total + 1)))
    for guess, _ in images:
        count = len(guess["labels"])
        guess["scores"] = np.array(scores[:count], np.float64) / (total + 1)
        scores = scores[count:]
    return images


def _split(pairs: list[Any]) -> tuple[list[Any], list[Any]]:
    return [box for box, _ in pairs], [label for _, label in pairs]


def evaluate(images: list[Image], **options: Any) -> dict[str, float]:
    metric = CocoMetrics(NAMES, **options)
    metric.update([guess for guess, _ in images], [truth for _, truth in images])
    return metric.compute()


@given(scenes())
def test_scores_equal_those_of_greedy_matching_written_out(images: list[Image]) -> None:
    scores = evaluate(images, iou_types=("bbox", "segm"))

    for kind, shape in (("bbox", "boxes"), ("segm", "masks")):
        table = reference_table(images, shape)
        expected = {"map": mean(table), "map_50": mean(table[:, 0]), "map_75": mean(table[:, 5])}
        expected |= {f"ap_{name}": mean(table[row]) for row, name in enumerate(NAMES)}
        for key, value in expected.items():
            assert scores[f"{kind}_{key}"] == pytest.approx(value, abs=1e-9, nan_ok=True)


@given(scenes(), st.integers(0, 4), st.randoms(use_true_random=False))
def test_neither_batches_nor_the_order_of_images_show(
    images: list[Image], cut: int, random: Any
) -> None:
    shuffled = list(images)
    random.shuffle(shuffled)
    metric = CocoMetrics(NAMES)
    for part in (shuffled[:cut], shuffled[cut:]):
        metric.update(
            [{k: torch.from_numpy(v) for k, v in guess.items()} for guess, _ in part],
            [truth for _, truth in part],
        )

    np.testing.assert_equal(metric.compute(), evaluate(images))


@given(scenes())
def test_a_perfect_prediction_scores_one(images: list[Image]) -> None:
    # Two objects of one class in one place would be interchangeable: still all found.
    perfect = [
        ({**truth, "scores": np.linspace(0.9, 0.5, len(truth["labels"]))}, truth)
        for _, truth in images
    ]
    scores = evaluate(perfect, iou_types=("bbox", "segm"))

    if any(len(truth["labels"]) for _, truth in images):
        assert scores["bbox_map"] == pytest.approx(1.0)
        assert scores["segm_map"] == pytest.approx(1.0)
        assert scores["bbox_mar_100"] == pytest.approx(1.0)
    else:
        assert math.isnan(scores["bbox_map"])


def random_images(seed: int) -> list[Image]:
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(12):
        count = int(rng.integers(0, 7))
        corner, size = rng.integers(0, 120, (count, 2)), rng.integers(5, 120, (count, 2))
        boxes = np.concatenate([corner, corner + size], 1).astype(np.float64)
        truth = {
            "boxes": boxes,
            "labels": rng.integers(0, 2, count),
            "masks": np.array([rectangle(box, 256) for box in boxes], bool).reshape(-1, 256, 256),
            "iscrowd": rng.random(count) < 0.15,
        }
        kept = rng.random(count) < 0.8
        guessed = boxes[kept] + rng.integers(-4, 5, (int(kept.sum()), 4))
        guessed = np.concatenate([guessed.clip(0), boxes[:1] + 3])
        labels = np.concatenate([truth["labels"][kept], truth["labels"][:1]])
        masks = np.array([rectangle(box, 256) for box in guessed], bool).reshape(-1, 256, 256)
        scores = rng.random(len(labels))
        images.append(
            ({"boxes": guessed, "labels": labels, "scores": scores, "masks": masks}, truth)
        )
    return images


def pycocotools_stats(images: list[Image], iou_type: str) -> np.ndarray:
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")
    mask_api = pytest.importorskip("pycocotools.mask")
    truths, guesses = [], []
    for number, (guess, truth) in enumerate(images, start=1):
        for side, target in ((truth, truths), (guess, guesses)):
            for i, box in enumerate(side["boxes"]):
                item = {"image_id": number, "category_id": int(side["labels"][i])}
                encoded = mask_api.encode(np.asfortranarray(side["masks"][i].astype(np.uint8)))
                if iou_type == "bbox":
                    item["bbox"] = [*box[:2], box[2] - box[0], box[3] - box[1]]
                else:
                    item["segmentation"] = encoded
                if side is truth:
                    item["iscrowd"] = int(truth["iscrowd"][i])
                    item["id"] = len(truths) + 1
                    item["area"] = float((box[2] - box[0]) * (box[3] - box[1]))
                    if iou_type == "segm":
                        item["area"] = float(mask_api.area(encoded))
                else:
                    item["score"] = float(guess["scores"][i])
                target.append(item)
    data = {
        "info": {},
        "images": [{"id": i + 1, "height": 256, "width": 256} for i in range(len(images))],
        "annotations": truths,
        "categories": [{"id": i, "name": name} for i, name in enumerate(NAMES)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = coco.COCO()
        ground_truth.dataset = data
        ground_truth.createIndex()
        evaluation = cocoeval.COCOeval(ground_truth, ground_truth.loadRes(guesses), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
@pytest.mark.parametrize("seed", range(3))
def test_all_twelve_numbers_equal_those_of_pycocotools(seed: int, iou_type: Any) -> None:
    images = random_images(seed)
    expected = pycocotools_stats(images, iou_type)

    scores = evaluate(images, iou_types=(iou_type,))

    keys = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
    keys += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]
    ours = np.array([scores[f"{iou_type}_{key}"] for key in keys])
    np.testing.assert_allclose(ours, np.where(expected < 0, np.nan, expected), atol=1e-12)


def test_empty_images_count_and_their_detections_are_wrong() -> None:
    hit = objects([[0, 0, 10, 10]], [0])
    nothing = objects([], [])
    images = [({**hit, "scores": np.array([0.5])}, hit)]
    assert evaluate(images)["bbox_map"] == pytest.approx(1.0)
    assert evaluate([*images, ({**nothing, "scores": np.zeros(0)}, nothing)])["images"] == 2

    images.append(({**hit, "scores": np.array([0.9])}, nothing))

    assert evaluate(images)["bbox_map"] == pytest.approx(0.5)


def test_nothing_found_is_zero_and_nothing_to_find_is_nan() -> None:
    hit, nothing = objects([[0, 0, 10, 10]], [0]), objects([], [])

    scores = evaluate([({**nothing, "scores": np.zeros(0)}, hit)], iou_types=("bbox", "segm"))
    assert (scores["bbox_map"], scores["segm_map"], scores["bbox_ap_cat"]) == (0, 0, 0)
    assert math.isnan(scores["bbox_ap_dog"])

    assert math.isnan(evaluate([({**hit, "scores": np.ones(1)}, nothing)])["bbox_map"])
    assert math.isnan(CocoMetrics(NAMES).compute()["bbox_map"])


def test_area_given_or_of_the_mask_sorts_objects_by_size() -> None:
    big = {"boxes": np.array([[0, 0, 100, 100.0]]), "labels": np.array([0])}
    guess = {**big, "scores": np.array([0.5])}

    assert evaluate([(guess, big)])["bbox_map_large"] == pytest.approx(1.0)
    small = evaluate([(guess, {**big, "area": [100.0]})])
    assert math.isnan(small["bbox_map_large"])
    mask = np.zeros((1, 128, 128), bool)
    mask[0, :10, :10] = True
    both = evaluate(
        [({**guess, "masks": mask}, {**big, "masks": mask})], iou_types=("bbox", "segm")
    )
    assert math.isnan(both["bbox_map_large"])
    assert both["segm_map_small"] == pytest.approx(1.0)


def test_the_last_batch_brings_the_scores_and_counting_starts_over() -> None:
    hit = objects([[0, 0, 10, 10]], [0])
    metric = CocoMetrics(NAMES, convert=lambda p: ([p.predictions], [p.label_ids]))
    right = SimpleNamespace(predictions={**hit, "scores": np.ones(1)}, label_ids=hit)
    wrong = SimpleNamespace(predictions={**hit, "labels": np.ones(1, int), "scores": np.ones(1)})
    wrong.label_ids = hit

    assert metric(wrong, compute_result=False) == {}
    assert metric(right, compute_result=True)["bbox_mar_1"] == pytest.approx(0.5)
    assert metric(right)["bbox_map"] == pytest.approx(1.0)


def test_bad_settings_and_raw_outputs_are_refused() -> None:
    with pytest.raises(SFAError, match="different class names"):
        CocoMetrics(["cat", "cat"])
    with pytest.raises(SFAError, match="iou_types"):
        CocoMetrics(NAMES, iou_types=("boxes",))  # type: ignore[arg-type]
    with pytest.raises(SFAError, match=r"convert=\.\.\."):
        CocoMetrics(NAMES).update(torch.zeros(1), [])  # type: ignore[arg-type]
    with pytest.raises(SFAError, match="predictions of 0 images, labels of 1"):
        CocoMetrics(NAMES).update([], [{}])
    with pytest.raises(SFAError, match="expected a dict"):
        CocoMetrics(NAMES).update([3], [{}])  # type: ignore[list-item]


def test_without_the_library_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)

    with pytest.raises(SFAError, match=r"sfa-peft\[detection\]"):
        CocoMetrics(NAMES)


def test_dense_imports_neither_the_library_nor_evaluate() -> None:
    code = """
import sys, sfa_peft.dense
print(sorted({"faster_coco_eval", "evaluate", "numpy"} & set(sys.modules)))
"""
    found = run_code(code)

    assert found.stdout.strip() == "['numpy']", found.stderr
