# SPDX-License-Identifier: Apache-2.0
"""Recipes: a command line in a file, which the real command line overrides."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import Trainer, TrainingArguments

EXAMPLES = Path(__file__).parents[3] / "examples"
CONTENT = {
    "method": "lora",
    "budget": 0.2,
    "image_size": [48, 64],
    "dataset_name": "somewhere",
    "learning_rate": "1e-4",  # what yaml makes of 1e-4
    "selection_from": None,
    "bf16": True,
    "lr_scheduler_kwargs": {"power": 0.9},
}


@pytest.fixture
def arguments() -> ModuleType:
    return importlib.import_module("common.arguments")


def parse(arguments: ModuleType, *argv: Any) -> Any:
    return arguments.parse(arguments.SharedArguments, [*map(str, argv)], "test")


@pytest.mark.parametrize("write", [json.dumps, yaml.safe_dump])
def test_a_recipe_sets_defaults_and_the_command_line_wins(
    write: Any, arguments: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "recipe"
    path.write_text(write(CONTENT))

    args = parse(arguments, "--budget", 0.1, "--recipe", path, "--image_size", 32)

    assert (args.method, args.budget, args.image_size) == ("lora", 0.1, [32, 32])
    assert (args.learning_rate, args.selection_from, args.bf16) == (1e-4, None, True)
    assert args.schedule_options() == {"power": 0.9}
    assert args.max_steps == arguments.SharedArguments().max_steps


def test_of_several_recipes_the_last_holds(arguments: ModuleType, tmp_path: Path) -> None:
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text("budget: 0.2\nmax_steps: 30\nimage_size: [48, 64]\ndataset_name: x\n")
    second.write_text("budget: 0.3\nimage_size: 32\nmax_steps: null\nseed: 5\n")

    args = parse(arguments, "--seed", 7, "--recipe", first, second)

    assert (args.budget, args.max_steps, args.image_size) == (0.3, 30, [32, 32])
    assert (args.seed, args.recipe) == (7, [str(first), str(second)])
    assert parse(arguments, "--recipe", second, first).budget == 0.2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b", "expected `option: value` lines"),
        ("budget: {", "cannot be read"),
        ("steps: 3\ncolour: red", "unknown options ['colour', 'steps']"),
        ("max_steps: many", "invalid int value: 'many'"),
        ("budget: 0", "--budget: expected a share"),
        ("lr_scheduler_kwargs: high", "--lr_scheduler_kwargs: not json"),
        ("lr_scheduler_kwargs: '[1]'", "--lr_scheduler_kwargs: expected a json object"),
        ("bf16: true\nfp16: true", "--bf16, --fp16: one of them"),
        ("num_train_epochs: 0", "--num_train_epochs: expected above 0, got 0"),
        ("num_train_epochs: 2", "--num_train_epochs: rendered scenes never repeat"),
        ("selection_from: x\nmethod: lora", "--selection_from: needs --method sfa"),
        (
            "adapter_dim: 3\nmethod: lora",
            "--adapter_dim: needs --method sfa, adaptformer, adapter_p",
        ),
        ("method: linear", "--method: invalid choice: 'linear'"),
        ("layer_decay: 1.5", "--layer_decay: expected a factor in (0, 1], got 1.5"),
        ("no_decay: [norms, heads]", "--no_decay: expected some of ['norms', 'biases', 'embed"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused(
    text: str,
    message: str,
    arguments: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text(text)

    with pytest.raises(SystemExit, match="2"):
        parse(arguments, "--recipe", tmp_path / "recipe.yaml")

    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("images", "batch", "accumulation"), [(10, 4, 1), (10, 4, 2), (7, 2, 4)])
def test_epochs_become_as_many_steps_as_the_trainer_counts(
    images: int, batch: int, accumulation: int, arguments: ModuleType, tmp_path: Path
) -> None:
    options = ["--per_device_train_batch_size", batch, "--gradient_accumulation_steps"]
    options += [accumulation, "--dataset_name", "x", "--num_train_epochs", 3]
    args = parse(arguments, *options)

    args.count_steps(images)

    data = [{"x": torch.zeros(1), "labels": torch.zeros(1)}] * images
    settings = TrainingArguments(
        str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(Line(), settings, train_dataset=data)
    trainer.train()
    assert args.max_steps == trainer.state.max_steps


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * x - labels).square().mean()}


def test_rendered_scenes_have_a_size_and_own_data_must_be_given_one(arguments: ModuleType) -> None:
    assert (parse(arguments).image_size, arguments.SharedArguments().image_size) == ([64, 64],) * 2
    assert not parse(arguments, "--dataset_name", "x").has_size
    assert parse(arguments, "--dataset_name", "x", "--image_size", 96).has_size
