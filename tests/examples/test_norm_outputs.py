# SPDX-License-Identifier: Apache-2.0
"""`--norm_outputs`: norms belong to every head and come back exactly from every kind of file."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

SHORT = ["--max_steps", 4, "--per_device_train_batch_size", 2, "--max_eval_samples", 2]
SMALL = ["--hidden_size", 32, "--num_queries", 8]
HEADS = {
    "upernet": ("semantic_segmentation", []),
    "mask2former": ("semantic_segmentation", ["--head", "mask2former", *SMALL]),
    "deconv": ("depth_estimation", []),
    "dpt": ("depth_estimation", ["--head", "dpt"]),
    "rt_detr": ("object_detection", [*SMALL, "--decoder_layers", 1]),
    "instances": ("instance_segmentation", SMALL),
}


@pytest.mark.parametrize(
    ("head", "method"),
    [
        ("upernet", "frozen"),
        ("mask2former", "full"),
        ("deconv", "full"),
        ("dpt", "lora"),
        ("rt_detr", "full"),
        ("rt_detr", "sfa"),
        ("instances", "sfa"),
    ],
)
def test_norms_of_outputs_are_trained_and_saved_with_the_head(
    head: str, method: str, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if head in ("rt_detr", "instances"):
        pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")
    task, options = HEADS[head]
    script = importlib.import_module(task)
    options = ["--backbone", backbone, "--method", method, "--budget", 0.2, *options]
    options = [*map(str, [*options, *SHORT, "--output_dir", tmp_path, "--norm_outputs"])]
    args = importlib.import_module("common.arguments").parse(script.Arguments, options, "")

    sizes, data = {}, script.load_data(args)
    for args.norm_outputs in (False, True):
        ready: Any = importlib.import_module("common.methods").prepare_method(
            script.make_model(args, data), args
        )
        sizes[args.norm_outputs] = sum(p.numel() for p in ready.head), ready.backbone_size
    channels = {"deconv": [128], "rt_detr": [32, 64]}.get(head, [16, 32, 64, 128])

    script.main(options)

    assert f"loaded again from {tmp_path}: same outputs" in capsys.readouterr().out
    assert sizes[True][0] - sizes[False][0] == 2 * sum(channels)
    assert sizes[True][1] == sizes[False][1]
