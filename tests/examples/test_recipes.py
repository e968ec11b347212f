# SPDX-License-Identifier: Apache-2.0
"""Every recipe is one that its script takes, and means what its comments say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Swinv2ForImageClassification

from tests.tiny import swinv2_config

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").iterdir())


def read(path: Path) -> tuple[Any, Any]:
    """Return the script that a recipe names, and its arguments."""
    found = re.search(
        r"python examples/(\w+)\.py --recipe examples/recipes/(\S+)", path.read_text()
    )
    assert found is not None
    assert found[2] == path.name
    script = importlib.import_module(found[1])
    arguments = importlib.import_module("common.arguments")
    return script, arguments.parse(
        script.Arguments, ["--recipe", str(path), "--dataset_name", "data"], "test"
    )


def test_there_is_one_for_each_experiment() -> None:
    names = ["ade20k_mask2former", "cityscapes_from_ade20k", "coco_detection", "coco_instances"]
    assert [path.stem for path in RECIPES] == [*names, "kitti_depth", "nyuv2_depth"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_read_and_its_head_built(path: Path, tmp_path: Path) -> None:
    script, args = read(path)
    torch.manual_seed(0)
    tiny = swinv2_config(image_size=192, window_size=12)
    Swinv2ForImageClassification(tiny).save_pretrained(tmp_path)
    assert args.backbone == "microsoft/swinv2-base-patch4-window12-192-22k"
    assert args.method == "sfa"
    args.backbone = str(tmp_path)
    data = importlib.import_module("common.data").Data([], [], ["a", "b"])

    model = script.make_model(args, data)

    if "coco_detection" in path.stem:
        assert model.config.feat_strides == [8, 16, 32]
        assert model.config.num_queries == 300
    elif "depth" not in path.stem:
        assert model.config.encoder_layers == 6
        assert model.config.train_num_points == 12544
        assert (model.config.feature_size, model.config.num_queries) == (256, 100)
    else:
        layers = model.backbone.encoder.layers
        windows = [layer.blocks[0].attention.self.window_size[0] for layer in layers]
        wanted = {"nyuv2_depth": [30, 30, 30, 15], "kitti_depth": [22, 22, 22, 11]}
        assert windows == wanted[path.stem]
        assert list(model.backbone.config.pretrained_window_sizes) == [12, 12, 12, 6]
    images = args.per_device_train_batch_size * args.gradient_accumulation_steps
    assert args.selection_steps == (None if args.selection_from else 2000)
    assert images == (24 if "depth" in path.stem else 16)
