# SPDX-License-Identifier: Apache-2.0
"""The example as a user runs it, small: shipped scenes, own data, and options that cannot work."""

from __future__ import annotations

import importlib
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import Swinv2ForImageClassification

from tests.tiny import swinv2_config

SCRIPT = Path(__file__).parents[2] / "examples" / "semantic_segmentation.py"
NAMES = ["sky", "road", "car"]
UNLABELLED = 9
COUNTS = {"train": 5, "validation": 3}  # 5: batches of two would leave one image alone
SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--max_eval_samples", "6"]


@pytest.fixture
def example() -> ModuleType:
    return importlib.import_module("semantic_segmentation")


def command(monkeypatch: pytest.MonkeyPatch, *options: Any) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, options)])


def make_pair(split: str, index: int) -> tuple[Image.Image, Image.Image]:
    rng = np.random.default_rng((len(split), index))
    ids = rng.integers(0, len(NAMES), (32, 40)).astype(np.uint8)
    ids[::8] = UNLABELLED  # in every crop
    image = 80 * ids[..., None] + rng.integers(0, 20, (32, 40, 3)).astype(np.uint8)
    return Image.fromarray(image), Image.fromarray(ids)


def make_imagefolder(root: Path) -> Path:
    for split, count in COUNTS.items():
        (root / split / "masks").mkdir(parents=True)
        rows = []
        for i in range(count):
            image, mask = make_pair(split, i)
            image.save(root / split / f"{i}.png")
            mask.save(root / split / "masks" / f"{i}.png")
            row = {"image_file_name": f"{i}.png", "label_file_name": f"masks/{i}.png"}
            rows.append(json.dumps(row))
        (root / split / "metadata.jsonl").write_text("\n".join(rows))
    return root


def make_parquet(root: Path) -> Path:
    from datasets import Dataset, Features
    from datasets import Image as ImageFeature

    root.mkdir()
    features = Features({"image": ImageFeature(), "label": ImageFeature()})
    for split, count in COUNTS.items():
        images, masks = zip(*(make_pair(split, i) for i in range(count)), strict=True)
        rows = Dataset.from_dict({"image": images, "label": masks}, features=features)
        rows.to_parquet(str(root / f"{split}-00000-of-00001.parquet"))
    return root


@pytest.mark.parametrize("head", ["upernet", "mask2former"])
def test_a_run_leaves_what_it_says(
    head: str, example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ["--head", head, "--hidden_size", "32", "--budget", "0.2", "--output_dir", str(out)]

    result = example.main([*options, *SHORT])

    printed = capsys.readouterr().out
    assert f"loaded again from {out}: same outputs" in printed
    row = json.loads((out / "results.json").read_text())["row"]
    assert row == result.row
    assert row["method"] == "SFA 20%"
    assert 0.198 <= row["trainable_share"] <= 0.2
    assert row["bytes"] == (out / "adapter_model.safetensors").stat().st_size
    assert f"{row['bytes']:,}" in printed
    assert 0 < row["scores"]["mean_iou"] < 1
    for picture in ("predictions.png", "training.png", "selection.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 100
    assert json.loads((out / "adapter_config.json").read_text())["peft_type"] == "SFA"
    assert "import sfa_peft" in (out / "README.md").read_text()


def test_mask2former_takes_and_gives_class_maps(example: ModuleType, backbone: Path) -> None:
    options = {"backbone": str(backbone), "head": "mask2former", "hidden_size": 32}
    model = example.build_model(example.Arguments(image_size=[32, 32], **options), 3)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 32, 32), 255)
    labels[0, :16], labels[0, 16:] = 0, 2  # the second image has no label at all

    trained = model.train()(pixel_values=pixels, labels=labels)
    trained.loss.backward()
    with torch.no_grad():
        guessed = model.eval()(pixel_values=pixels)
        plain = super(type(model), model).forward(pixel_values=pixels)

    assert trained.loss.isfinite()
    assert guessed.logits.shape == (2, 3, 32, 32)
    # Pixel by pixel, what the paper calls semantic inference.
    cover = torch.nn.functional.interpolate(
        plain.masks_queries_logits, (32, 32), mode="bilinear", align_corners=False
    )
    for row, column in ((0, 0), (13, 30)):
        scores = torch.zeros(3)
        for query in range(cover.shape[1]):
            share = plain.class_queries_logits[1, query].softmax(-1)
            scores += share[:3] * cover[1, query, row, column].sigmoid()
        assert torch.allclose(guessed.logits[1, :, row, column].exp(), scores, rtol=1e-4)


@pytest.mark.parametrize("make_data", [make_imagefolder, make_parquet])
def test_own_data_and_an_own_backbone_are_trained_on(
    make_data: Any,
    example: ModuleType,
    backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out, classes = make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "names.json"
    classes.write_text(json.dumps({"classes": NAMES, "ignore_index": UNLABELLED}))
    options = ["--dataset_name", data, "--classes", classes, "--backbone", backbone]
    options += ["--budget", 0.2, "--image_size", 32, *SHORT]

    example.main([*map(str, options), "--output_dir", str(out)])

    assert "same outputs" in capsys.readouterr().out
    row = json.loads((out / "results.json").read_text())["row"]
    assert row["trainable_share"] <= 0.2
    assert [name for name in row["scores"] if name.startswith("iou_")] == [
        f"iou_{name}" for name in NAMES
    ]
    assert 0 <= row["scores"]["mean_iou"] <= 1


def test_training_starts_from_the_weights_of_the_backbone(
    example: ModuleType, backbone: Path
) -> None:
    model = example.build_model(example.Arguments(backbone=str(backbone)), len(NAMES))

    there = {f"swinv2.{n}": p for n, p in model.backbone.named_parameters()}
    stored = load_file(backbone / "model.safetensors")
    known = there.keys() & stored.keys()
    assert all(torch.equal(there[n], stored[n]) for n in known)
    # The norms of the feature maps are UperNet's own; a backbone has no norm or head at its end.
    assert all("hidden_states_norms" in n for n in there.keys() - known)
    assert len(known) > 50


def test_windows_of_pretraining_are_kept_or_worked_out(example: ModuleType, tmp_path: Path) -> None:
    stated = {"depths": [1] * 4, "pretrained_window_sizes": [12, 12, 12, 6], "window_size": 24}
    for name, changes in {"unknown": {}, "stated": {"image_size": 384, **stated}}.items():
        torch.manual_seed(0)
        model = Swinv2ForImageClassification(swinv2_config(**changes))
        model.save_pretrained(tmp_path / name)
    unknown, known = (
        example.build_model(example.Arguments(backbone=str(tmp_path / name)), 3).backbone
        for name in ("unknown", "stated")
    )

    assert list(unknown.config.pretrained_window_sizes) == [4, 4, 2, 0]
    assert list(known.config.pretrained_window_sizes) == [12, 12, 12, 6]
    for backbone in (unknown, known):
        maps = backbone(torch.randn(2, 3, 64, 64)).feature_maps
        assert all(features.isfinite().all() for features in maps)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "linear"], "--method: invalid choice: 'linear'"),
        (["--recipe", "nothing.yaml"], "--recipe nothing.yaml: cannot be read"),
        (["--resume_from_checkpoint", "last"], "no checkpoint in out"),
        (["--resume_from_checkpoint", "."], "no checkpoint of a Trainer there"),
        (["--method", "lora", "--budget", 0.001], "LoRA of rank 1 already has"),
        (["--method", "adaptformer", "--budget", 0.001], "AdaptFormer of width 1 already has"),
        (["--split", "dev"], "--split: invalid choice: 'dev'"),
        (["--dataset_name", "no/such"], "--dataset_name no/such: no such folder"),
        (["--dataset_name", "no/such", "--classes", "names.json"], "Couldn't reach 'no/such'"),
        (["--dataset_name", "data", "--classes", "nothing.json"], "cannot read class names"),
        (["--dataset_name", ".", "--classes", "names.json"], "no known layout"),
        (["--backbone", "no/such"], "--backbone no/such: "),
        (["--backbone", "vit"], "--backbone vit: a vit checkpoint"),
        (["--budget", 2], "expected a share of the backbone"),
        (["--budget", 0.001], "The smallest budget that works is"),
        (["--rho", -1], "SFAConfig.rho: expected"),
        (["--score", "taste"], "unknown score 'taste'"),
        (["--image_size", 32, 64], "rendered scenes are square"),
        (["--image_size", 32, 32, 3], "expected one number or height and width"),
        (["--image_size"], "expected at least one argument"),
        (["--output_dir", "names.json"], "names.json is a file"),
        (["--max_steps", 1], "--max_steps: "),
        (["--per_device_train_batch_size", 1], "--per_device_train_batch_size: "),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_written(
    options: list[Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("names.json").write_text(json.dumps(NAMES))
    Path("data/trainannot").mkdir(parents=True)
    Path("vit").mkdir()
    Path("vit/config.json").write_text('{"model_type": "vit"}')
    command(monkeypatch, "--output_dir", "out", *SHORT, *options)

    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")

    assert stopped.value.code not in (None, 0)
    assert message in f"{stopped.value.code} {capsys.readouterr().err}"
    assert not Path("out").exists()


def change_ids(mask: Image.Image) -> Image.Image:
    ids = np.array(mask)
    ids[::8] = 7
    return Image.fromarray(ids)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda mask: mask, [], "holds ids [9], which are no classes; expected 0 to 2, 255. Check"),
        (change_ids, ["--ignore_index", UNLABELLED], "holds ids [7], which are no classes"),
        (change_ids, [], "png (row "),
        (change_ids, [], "(--ignore_index)"),
        (
            lambda mask: mask.resize((20, 16), 0),
            ["--ignore_index", UNLABELLED],
            "must have one size",
        ),
        (lambda mask: mask, ["--split", "test"], "--split test: there is none"),
        (lambda mask: mask, ["--label_column_name", "depth"], "pass --label_column_name"),
    ],
)
def test_data_that_does_not_fit_is_named_and_leaves_no_result(
    change: Any,
    options: list[Any],
    message: str,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = make_imagefolder(tmp_path / "data")
    (data / "classes.json").write_text(json.dumps(NAMES))
    for path in data.rglob("masks/*.png"):
        with Image.open(path) as mask:
            changed = change(mask.copy())
        changed.save(path)
    command(
        monkeypatch, "--dataset_name", data, "--backbone", backbone, "--image_size", 32, *SHORT,
        "--output_dir", tmp_path / "out", *options,
    )  # fmt: skip

    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")

    assert message in str(stopped.value.code)
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not written


def test_a_selection_is_trained_anew_on_other_data(
    example: ModuleType, backbone: Path, tmp_path: Path
) -> None:
    same = ["--backbone", str(backbone), "--budget", "0.2", *SHORT]
    first, second = tmp_path / "first", tmp_path / "second"
    example.main([*same, "--output_dir", str(first)])
    data = make_imagefolder(tmp_path / "data")
    (data / "classes.json").write_text(json.dumps({"classes": NAMES, "ignore_index": UNLABELLED}))

    options = ["--selection_from", str(first), "--dataset_name", str(data), "--image_size", "32"]
    row = example.main([*same, *options, "--output_dir", str(second)]).row

    assert 0.19 < row["trainable_share"] <= 0.2
    assert (second / "selection.png").is_file()


def test_external_adapters_alone_have_no_picture_of_a_selection(
    example: ModuleType, backbone: Path, tmp_path: Path
) -> None:
    options = ["--backbone", str(backbone), "--budget", "0.2", "--rho", "1", *SHORT]
    example.main([*options, "--output_dir", str(tmp_path)])
    assert (tmp_path / "predictions.png").is_file()
    assert not (tmp_path / "selection.png").exists()
