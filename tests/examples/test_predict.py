# SPDX-License-Identifier: Apache-2.0
"""A folder that a script leaves becomes the model again, and predicts what its evaluation saw."""

from __future__ import annotations

import importlib
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

import sfa_peft
from sfa_peft import AdapterFileError, SFAError
from sfa_peft.dense import DenseMaps, TaskSpec, decode_mask, predict, task_processor
from tests.examples.test_dense_tasks import make_coco_folder
from tests.image_sizes import write_folder

MAPS = ("semantic_segmentation", "depth_estimation")
SFA = ["--score", "random"]  # selects without training
CASES = [
    ("semantic_segmentation", SFA),
    ("semantic_segmentation", ["--head", "mask2former", "--norm_outputs", "1", *SFA]),
    ("semantic_segmentation", ["--method", "lora"]),
    ("semantic_segmentation", ["--method", "full", "--norm_outputs", "1"]),
    ("depth_estimation", SFA),
    ("depth_estimation", ["--eval_size", "48", "64", "--method", "full"]),
    ("depth_estimation", ["--head", "dpt", "--norm_outputs", "1", "--method", "frozen"]),
    ("object_detection", ["--norm_outputs", "1", *SFA]),
    ("instance_segmentation", SFA),
]
PIPED = CASES[::3] + CASES[-2:]
if find_spec("torchvision") is not None:
    CASES.insert(1, ("object_detection", ["--head", "faster_rcnn", *SFA]))
    CASES.insert(2, ("instance_segmentation", ["--head", "mask_rcnn", "--norm_outputs", "1", *SFA]))


def saved(task: str, options: list[str], backbone: Path, root: Path) -> Any:
    """Save a model as its script does, but for the training; return how it is evaluated too."""
    if task not in MAPS:
        pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
        folder = make_coco_folder(root / "data")
    else:
        folder = write_folder(root / "data")
    common = {n: importlib.import_module(f"common.{n}") for n in ("arguments", "methods", "task")}
    example = importlib.import_module(task)
    argv = ["--dataset_name", folder, "--backbone", backbone, "--output_dir", root / "out"]
    argv += ["--image_size", 64, "--budget", 0.2, *options]
    args = common["arguments"].parse(example.Arguments, [str(a) for a in argv], "")
    data = example.load_data(args)
    model = example.make_model(args, data)
    spec = common["task"].describe(example.TASK, args, data, model)
    ready = common["methods"].prepare_method(model, args)
    with torch.no_grad():  # as if trained
        for parameter in ready.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    common["methods"].save_method(ready, args, root / "out")
    spec.write(root / "out", metrics={"mean_iou": 0.5})
    return ready.model.eval(), example.scoring(args, data), data


def pictures(task: str, root: Path) -> list[Path]:
    if task in MAPS:
        return sorted((root / "data" / "validation").glob("*_image.png"))
    return sorted((root / "data" / "val2017").glob("*.jpg"))


def evaluated(task: str, model: Any, scoring: Any, data: Any) -> list[Any]:
    """What the script's evaluation compares with the truth, image by image."""
    found = []
    for item in (data.evaluation[i] for i in range(len(data.evaluation))):
        if task in MAPS:
            with torch.no_grad():
                labels = item["labels"][None]
                size = tuple(labels.shape[-2:])
                maps = DenseMaps(scoring.plain(model, item["pixel_values"][None], size), "scores")
                found.append(scoring.at_labels(maps.resized(size).values, labels)[0].numpy())
        else:
            sizes = [tuple(item["labels"]["orig_size"].tolist())]
            found += scoring.predict(model, scoring.collate([item]), sizes)
    return found


@pytest.fixture(params=CASES, ids=lambda case: "-".join([case[0], *case[1]]).replace("--", ""))
def case(request: pytest.FixtureRequest, backbone: Path, tmp_path: Path) -> Any:
    task, options = request.param
    torch.manual_seed(0)
    return task, saved(task, options, backbone, tmp_path), tmp_path


def test_a_folder_predicts_what_the_evaluation_of_its_training_saw(case: Any) -> None:
    task, (model, scoring, data), root = case
    known = evaluated(task, model, scoring, data)
    found = predict(root / "out", pictures(task, root), threshold=0.0)
    assert len(found) == len(known)
    for ours, theirs in zip(found, known, strict=True):
        if task == "semantic_segmentation":
            assert ours.shape == theirs.shape
            assert (ours != theirs).mean() < 1e-3  # ties, and batches round otherwise
        elif task == "depth_estimation":
            np.testing.assert_allclose(ours, theirs, rtol=1e-4)
        else:
            check_objects(ours, theirs)


def check_objects(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    order = np.argsort(-np.asarray(theirs["scores"]), kind="stable")
    np.testing.assert_allclose(ours["scores"], np.asarray(theirs["scores"])[order], rtol=1e-4)
    if "masks" not in theirs:
        np.testing.assert_allclose(ours["boxes"], theirs["boxes"][order], atol=1e-2)
        return
    for mask, runs in zip(ours["masks"], (theirs["masks"][i] for i in order), strict=True):
        assert (mask != decode_mask(runs, *mask.shape)).mean() < 1e-3


PIPELINES = {
    "semantic_segmentation": "image-segmentation",
    "depth_estimation": "depth-estimation",
    "object_detection": "object-detection",
    "instance_segmentation": "image-segmentation",
}


@pytest.mark.parametrize("case", PIPED, indirect=True, ids=str)
def test_pipelines_of_transformers_say_the_same(case: Any) -> None:
    task, _, root = case
    model = sfa_peft.load_task(root / "out")
    processor = task_processor(model.task_spec)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    piped = pipeline(PIPELINES[task], model=base, image_processor=processor)
    file = str(pictures(task, root)[0])
    (ours,) = predict(model, [file], threshold=0.2)
    theirs = piped(file) if task in MAPS else piped(file, threshold=0.2)
    names = model.task_spec.class_names
    if task == "semantic_segmentation":
        for one in theirs:
            ids = ours == names.index(one["label"])
            assert np.array_equal(np.asarray(one["mask"]) > 0, ids)
    elif task == "depth_estimation":
        np.testing.assert_allclose(theirs["predicted_depth"].numpy(), ours, rtol=1e-5)
    else:
        order = sorted(theirs, key=lambda one: -one["score"])
        scores = [one["score"] for one in order]
        np.testing.assert_allclose(scores, ours["scores"], rtol=1e-5)
        assert [one["label"] for one in order] == [names[i] for i in ours["labels"]]


def test_a_run_from_training_to_files(
    backbone: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    short = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--image_size", 32]
    options = ["--dataset_name", folder, "--backbone", backbone, "--output_dir", out, *short]
    result = importlib.import_module("semantic_segmentation").main([*map(str, options)])
    spec = TaskSpec.read(out)
    assert spec.metrics == result.row["scores"]
    assert spec.method == {"name": "sfa", "budget": 0.05}
    assert spec.class_names == ("sky", "road", "car")

    files = [str(path) for path in pictures("semantic_segmentation", tmp_path)]
    importlib.import_module("predict").main([str(out), *files, "-o", str(tmp_path / "seen")])
    assert "5 pictures of semantic_segmentation" in capsys.readouterr().out
    content = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert [image["file_name"] for image in content["images"]] == files
    for file, ids in zip(files, predict(out, files, batch_size=1), strict=True):
        stored = np.asarray(Image.open(tmp_path / "seen" / f"{Path(file).stem}.png"))
        assert np.array_equal(stored, ids)


def test_a_task_whose_files_are_missing_or_of_a_baseline_with_own_layers_says_so(
    backbone: Path, tmp_path: Path
) -> None:
    saved("depth_estimation", ["--method", "adaptformer"], backbone, tmp_path)
    with pytest.raises(AdapterFileError, match=r"no place for, first .*loaded by the script"):
        sfa_peft.load_task(tmp_path / "out")
    (tmp_path / "out" / "trained.safetensors").write_bytes(b"cut")
    with pytest.raises(AdapterFileError, match="cut short or damaged"):
        sfa_peft.load_task(tmp_path / "out")
    (tmp_path / "out" / "trained.safetensors").unlink()
    with pytest.raises(SFAError, match="Copy the whole folder"):
        sfa_peft.load_task(tmp_path / "out")


def test_another_backbone_than_that_of_the_training_is_refused(
    backbone: Path, tmp_path: Path
) -> None:
    saved("depth_estimation", SFA, backbone, tmp_path)
    other = tmp_path / "other"
    shutil.copytree(backbone, other)
    example = importlib.import_module("depth_estimation")
    model = example.load_backbone(example.Arguments(backbone=str(backbone)))
    torch.nn.init.normal_(model.encoder.layers[0].blocks[0].intermediate.dense.weight)
    model.save_pretrained(other)
    with pytest.raises(AdapterFileError, match="trained on other pretrained weights"):
        sfa_peft.load_task(tmp_path / "out", backbone=str(other))
