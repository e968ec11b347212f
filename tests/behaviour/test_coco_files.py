# SPDX-License-Identifier: Apache-2.0
"""A COCO file read, resized for the model and scored here gives what COCO's own tools give."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sfa_peft.dense import CocoMetrics, ObjectResize, load_dense, true_objects
from sfa_peft.dense.coco_masks import decode_mask, encode_masks
from tests.dense.test_coco_masks import slow_counts

pytest.importorskip("faster_coco_eval")
# The module with COCO, and with COCOeval, of each of the tools.
TOOLS = [
    ("faster_coco_eval", "COCO", "faster_coco_eval", "COCOeval_faster"),
    ("pycocotools.coco", "COCO", "pycocotools.cocoeval", "COCOeval"),
]
STATS = ["map", "map_50", "map_75", "map_small", "map_medium", "map_large"]
STATS += ["mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"]


def some_polygon(rng: np.random.Generator, width: int, height: int) -> list[float]:
    """A star-shaped outline of 5 to 300 pixels across, with COCO's two digits."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(5, 14)))
    radii = np.exp(rng.uniform(np.log(2.5), np.log(150))) * rng.uniform(0.6, 1, len(angles))
    centre = rng.uniform((0.2 * width, 0.2 * height), (0.8 * width, 0.8 * height))
    corners = centre + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), 1)
    return np.clip(corners, 0, (width, height)).round(2).ravel().tolist()


def annotated(rng: np.random.Generator, image: dict[str, Any]) -> dict[str, Any]:
    """An object of an image as COCO annotates it, one in ten a crowd with run lengths."""
    polygon = some_polygon(rng, image["width"], image["height"])
    x, y = polygon[::2], polygon[1::2]
    segmentation: Any = [polygon]
    is_crowd = bool(rng.random() < 0.1)
    if is_crowd:
        mask = decode_mask([polygon], image["height"], image["width"])
        segmentation = {"size": list(mask.shape), "counts": slow_counts(mask)}
    return {
        "image_id": image["id"],
        "category_id": int(rng.integers(17, 19)),
        "bbox": [min(x), min(y), max(x) - min(x), max(y) - min(y)],
        "area": float(0.5 * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1)))),
        "iscrowd": int(is_crowd),
        "segmentation": segmentation,
    }


def detected(
    rng: np.random.Generator, image: dict[str, Any], annotation: dict[str, Any]
) -> dict[str, Any]:
    """The same object a little beside where it is, as COCO writes results."""
    mask = decode_mask(annotation["segmentation"], image["height"], image["width"])
    box = [float(value) for value in annotation["bbox"] + rng.uniform(-1.5, 1.5, 4)]
    return {
        "image_id": image["id"],
        "category_id": annotation["category_id"],
        "score": float(rng.random()),
        "bbox": [*box[:2], max(box[2], 1.0), max(box[3], 1.0)],
        "segmentation": encode_masks(np.roll(mask, rng.integers(-2, 3, 2), (0, 1))[None])[0],
    }


def write(folder: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Write a data set of COCO's format; return its file and detections for it."""
    rng = np.random.default_rng(0)
    images, annotations, guesses = [], [], []
    (folder / "annotations").mkdir()
    (folder / "train").mkdir()
    for number in range(1, 13):
        width, height = (int(side) for side in rng.integers(200, 420, 2))
        image = {"id": number, "file_name": f"{number}.png", "width": width, "height": height}
        Image.new("RGB", (width, height)).save(folder / "train" / image["file_name"])
        images.append(image)
        for _ in range(int(rng.integers(0, 8))):
            annotations.append({"id": len(annotations) + 1, **annotated(rng, image)})
            if rng.random() < 0.85:
                guesses.append(detected(rng, image, annotations[-1]))
    categories = [{"id": 17, "name": "cat"}, {"id": 18, "name": "dog"}]
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    file = folder / "annotations" / "instances_train.json"
    file.write_text(json.dumps(content))
    return file, guesses


def official(tool: tuple[str, ...], file: Path, guesses: list[Any], kind: str) -> np.ndarray:
    """The twelve numbers of a tool that is given the file and the detections alone."""
    coco = getattr(pytest.importorskip(tool[0]), tool[1])
    evaluator = getattr(importlib.import_module(tool[2]), tool[3])
    keys = {"image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"}
    found = [{key: guess[key] for key in keys} for guess in guesses]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco(str(file))
        evaluation = evaluator(truth, truth.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return np.asarray(evaluation.stats[:12], float)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool[0].split(".")[0])
def test_the_twelve_numbers_are_those_of_the_tool_given_the_file(
    tmp_path: Path, tool: tuple[str, ...], kind: Any
) -> None:
    file, guesses = write(tmp_path)
    expected = official(tool, file, guesses, kind)
    data = load_dense("instances", tmp_path, dataset_format="coco").train
    metric = CocoMetrics(("cat", "dog"), iou_types=(kind,))
    for index in range(len(data)):
        # The model's input is square and of another size than any image.
        labels = ObjectResize((512, 512))(*data[index])["labels"]
        mine = [g for g in guesses if g["image_id"] == int(labels["image_id"])]
        boxes = np.array([g["bbox"] for g in mine]).reshape(-1, 4)
        guess = {
            "scores": [g["score"] for g in mine],
            "labels": np.array([g["category_id"] - 17 for g in mine], int),
            "boxes": np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1),
            "masks": [g["segmentation"] for g in mine],
        }
        metric.update([guess], [true_objects(labels)])

    scores = metric.compute()

    assert min(expected) > 0
    ours = np.array([scores[f"{kind}_{name}"] for name in STATS])
    np.testing.assert_allclose(ours, expected, atol=1e-9)
