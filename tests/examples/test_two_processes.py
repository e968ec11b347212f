# SPDX-License-Identifier: Apache-2.0
"""A script on two processes: one saves, and both count each image of the evaluation once."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfa_peft.dense.metrics.segmentation import SegmentationMetrics, argmax_logits
from tests.processes import run_script_on_ranks

SCRIPT = Path(__file__).parents[2] / "examples" / "semantic_segmentation.py"


def by_torchrun(cwd: Path, *program: object) -> str:
    """Run a program with its arguments on two processes, as a user does; return what it prints."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launch, *map(str, program)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_ranks(cwd: Path, *program: object) -> str:
    """The same without the launcher, which takes as long again."""
    ranks = run_script_on_ranks(*program, cwd=cwd)
    for rank in ranks:
        assert rank.returncode == 0, rank.stderr[-3000:]
    return "".join(rank.stdout for rank in ranks)


@pytest.mark.parametrize("own_data", [False, True], ids=["scenes", "images of several sizes"])
def test_two_processes_leave_one_result(
    own_data: bool,
    folder: Path,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    # 5 images: one process has an image more than the other.
    options = [*("--max_steps", "8", "--per_device_train_batch_size", "2", "--budget", "0.2")]
    options += ["--max_eval_samples", "5", "--backbone", str(backbone), "--output_dir", str(out)]
    options += ["--dataset_name", str(folder), "--image_size", "64"] if own_data else []
    program = (SCRIPT, *options, "--test_scales", "1", "1.5")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    printed = (on_ranks if own_data else by_torchrun)(tmp_path, *program)

    assert printed.count("same outputs") == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    scores = json.loads((out / "results.json").read_text())["row"]["scores"]

    example = importlib.import_module("semantic_segmentation")
    args = importlib.import_module("common.arguments").parse(example.Arguments, options, "")
    data = example.load_data(args)
    methods = importlib.import_module("common.methods")
    model = methods.load_method(example.make_model(args, data), args, out)
    counted = SegmentationMetrics(len(data.class_names))
    with torch.no_grad():
        for item in data.evaluation:
            logits = model(pixel_values=item["pixel_values"][None]).logits
            counted.update(argmax_logits(logits, item["labels"][None]), item["labels"][None])
    assert scores["mean_iou"] == pytest.approx(counted.compute()["mean_iou"], rel=1e-6)
    assert 0 <= scores["augmented_mean_iou"] <= 1
