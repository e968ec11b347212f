# SPDX-License-Identifier: Apache-2.0
"""Depth, detection and instance segmentation as a user runs them, with few steps."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_eval_samples", "4"]
SCORES = {
    "depth_estimation": "rmse",
    "object_detection": "bbox_map",
    "instance_segmentation": "segm_map",
}


def needs(task: str) -> None:
    if task in ("object_detection", "instance_segmentation"):
        pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")


def run(task: str, *options: Any) -> Any:
    return importlib.import_module(task).main([*SHORT, *map(str, options)])


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("depth_estimation", ["--head", "deconv"]),
        ("depth_estimation", ["--head", "dpt", "--method", "lora", "--budget", 0.2]),
        ("object_detection", ["--method", "sfa", "--budget", 0.2]),
        ("object_detection", ["--method", "mona", "--budget", 0.2]),
        ("instance_segmentation", ["--method", "internal"]),
    ],
)
def test_a_run_leaves_what_it_says(
    task: str, options: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(task)
    result = run(task, *options, "--output_dir", tmp_path)

    assert f"loaded again from {tmp_path}: same outputs" in capsys.readouterr().out
    row = json.loads((tmp_path / "results.json").read_text())["row"]
    assert row == result.row
    assert 0 < row["trainable_share"] <= 0.2
    score = row["scores"][SCORES[task]]
    assert score > 0.5 if task == "depth_estimation" else 0 <= score <= 1
    assert set(result.headers.values()) <= set(row["scores"])
    for name in ("predictions.png", "training.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 100


def test_items_of_scenes_are_those_of_the_documented_runs(tmp_path: Path) -> None:
    from sfa_peft.dense.scenes.render import SceneDataset

    example = importlib.import_module("semantic_segmentation")
    data = example.load_data(example.Arguments(eval_size=[64, 64], max_steps=2))
    for items, seed in ((data.train, 0), (data.evaluation, 1)):
        known = SceneDataset(len(items), seed=seed)
        for index in (0, len(items) - 1):
            for key, value in known[index].items():
                assert value.equal(items[index][key])


def make_depth_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, count in {"train": 5, "validation": 3}.items():
        (root / split / "depth").mkdir(parents=True)
        rows = []
        for i in range(count):
            pixels = rng.integers(0, 255, (64, 96, 3)).astype(np.uint8)
            depth = rng.integers(1, 9000, (64, 96)).astype(np.uint16)
            Image.fromarray(pixels).save(root / split / f"{i}.png")
            Image.fromarray(depth).save(root / split / "depth" / f"{i}.png")
            row = {"image_file_name": f"{i}.png", "depth_file_name": f"depth/{i}.png"}
            rows.append(json.dumps(row))
        (root / split / "metadata.jsonl").write_text("\n".join(rows))
    return root


def make_coco_folder(root: Path) -> Path:
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    for split, count in {"train2017": 5, "val2017": 3}.items():
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(count):
            pixels = rng.integers(0, 255, (64, 96, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / split / f"{i}.jpg")
            images.append({"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 96})
            annotations.append(
                {
                    "id": i,
                    "image_id": i,
                    "category_id": 3 + i % 2,
                    "bbox": [8, 8, 40, 30],
                    "area": 1200,
                    "iscrowd": 0,
                    "segmentation": [[8, 8, 48, 8, 48, 38, 8, 38]],
                }
            )
        categories = [{"id": 3, "name": "car"}, {"id": 4, "name": "cat"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize("task", SCORES)
def test_own_data_and_an_own_backbone_are_trained_on(
    task: str, backbone: Path, tmp_path: Path
) -> None:
    needs(task)
    options: list[Any] = ["--backbone", backbone, "--budget", 0.2, "--output_dir", tmp_path / "out"]
    if task == "depth_estimation":
        options += ["--dataset_name", make_depth_folder(tmp_path / "data"), "--max_depth", 10]
        options += ["--image_size", 64]
    else:
        folder = make_coco_folder(tmp_path / "data")
        options += ["--dataset_name", folder, "--dataset_format", "coco", "--image_size", 64]

    row = run(task, *options).row

    assert SCORES[task] in row["scores"]
    if task != "depth_estimation":
        kind = SCORES[task].removesuffix("_map")
        names = [name for name in row["scores"] if name.startswith(f"{kind}_ap_")]
        assert names == [f"{kind}_ap_car", f"{kind}_ap_cat"]


@pytest.mark.parametrize("task", ["depth_estimation", "object_detection", "instance_segmentation"])
def test_a_resumed_run_ends_where_the_whole_one_did(
    task: str, backbone: Path, tmp_path: Path
) -> None:
    needs(task)
    size = ["--image_size", 32] if task == "depth_estimation" else ["--image_size", 64]
    same = ["--backbone", backbone, "--budget", 0.2, *size, "--save_steps", 2]
    if task == "object_detection":
        same += ["--num_queries", 10]

    whole = run(task, *same, "--output_dir", tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    rest = run(
        task, *same, "--output_dir", tmp_path / "rest", "--resume_from_checkpoint", checkpoint
    )

    known = {name: value for name, value in whole.row["scores"].items() if value is not None}
    found = {name: value for name, value in rest.row["scores"].items() if value is not None}
    assert found == pytest.approx(known, rel=1e-4)
    assert rest.curve[0] == whole.curve[0]


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("depth_estimation", ["--max_depth", 0], "--max_depth: expected metres above 0"),
        ("depth_estimation", ["--per_device_train_batch_size", 1], "batch norm needs 2"),
        ("depth_estimation", ["--dataset_name", ".", "--dataset_format", "nyu"], "invalid choice"),
        ("depth_estimation", ["--dataset_name", "."], "no known layout"),
        ("object_detection", ["--num_queries", 400], "expected 1 to 80"),
        ("object_detection", ["--image_size", 48], "multiples of 32"),
        ("object_detection", ["--stages", "stage3", "stage2"], "in order"),
        ("object_detection", ["--dataset_name", ".", "--dataset_format", "kitti"], "kitti has"),
        ("instance_segmentation", ["--hidden_size", 48], "multiples of 32"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    task: str,
    options: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{task}.py"])
    training = importlib.import_module("common.training")

    with pytest.raises(SystemExit) as stopped:
        training.run_script(lambda: run(task, *options, "--output_dir", "out"))

    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not Path("out").exists()


def test_the_detection_head_starts_with_the_image_in_sight_and_boxes_on_the_anchors() -> None:
    example = importlib.import_module("object_detection")
    args = example.Arguments(eval_size=[64, 64])
    data = example.Data([], [], ["crate", "ball"])
    model = example.make_model(args, data).train()

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert all((m.weight == 1).all() for m in norms)
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        outputs = model.model(images)
    anchors, _ = model.model.generate_anchors(((8, 8), (4, 4)))
    assert torch.equal(outputs.enc_outputs_coord_logits, anchors.expand(4, -1, -1))


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("instance_segmentation", ["--head", "mask_rcnn", "--neck", "fpn"]),
        ("instance_segmentation", ["--head", "mask_rcnn", "--neck", "bifpn", "--cascade", "1"]),
        ("object_detection", ["--head", "faster_rcnn", "--method", "full"]),
    ],
)
def test_the_papers_detectors_leave_what_they_say(
    task: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs(task)
    pytest.importorskip("torchvision")

    result = run(task, *options, "--hidden_size", 16, "--num_samples", 8, "--output_dir", tmp_path)

    assert f"loaded again from {tmp_path}: same outputs" in capsys.readouterr().out
    wanted = {"bbox_map", "bbox_map_50"}
    wanted |= {"segm_map", "segm_map_50"} if task == "instance_segmentation" else set()
    assert set(result.headers.values()) == wanted
    assert all(0 <= result.row["scores"][key] <= 1 for key in wanted)
    with Image.open(tmp_path / "predictions.png") as image:
        assert min(image.size) > 100


@pytest.mark.parametrize("options", [["--cascade", "1"], ["--neck", "bifpn"]])
def test_necks_are_refused_of_heads_that_have_none(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("instance_segmentation", *options)

    assert "of --head faster_rcnn and mask_rcnn only" in capsys.readouterr().err
