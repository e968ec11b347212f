# SPDX-License-Identifier: Apache-2.0
"""The example as a user runs it, small: shipped scenes, own data, and options that cannot work."""

from __future__ import annotations

import importlib.util
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
SHORT = ["--max_steps", "4", "--per_device_train_batch_size", "2"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("semantic_segmentation_example", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # the argument parser looks it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_if_started_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))  # as `python examples/...` does
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Swinv2ForImageClassification(swinv2_config()).save_pretrained(tmp_path / "backbone")
    return tmp_path / "backbone"


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


def table(printed: str) -> dict[str, list[str]]:
    """Return the columns of each row of the printed table by the method's name."""
    lines = printed[printed.index("\nmethod ") :].strip().splitlines()
    rows = lines[1 : lines.index("")]
    return {line[:10].strip(): line[10:].split() for line in rows}


def test_the_demo_prints_the_table_and_writes_what_it_says(
    example: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    command(monkeypatch, "--output_dir", out, "--budget", 0.2, *SHORT)

    example.main()

    printed = capsys.readouterr().out
    assert f"loaded again from {out / 'sfa_20'}: same predictions" in printed
    columns = table(printed)
    assert list(columns) == ["frozen", "SFA 20%", "full"]
    assert [row[0] for row in columns.values()] == ["0.0%", "20.0%", "100.0%"]

    results = json.loads((out / "results.json").read_text())
    assert results["arguments"]["max_steps"] == 4
    frozen, sfa, full = results["rows"]
    assert (frozen["trainable_share"], full["trainable_share"]) == (0, 1)
    assert 0.198 <= sfa["trainable_share"] <= 0.2
    files = ["frozen/head.pt", "sfa_20/adapter_model.safetensors", "full/model.safetensors"]
    sizes = [(out / name).stat().st_size for name in files]
    assert [row["bytes"] for row in results["rows"]] == sizes
    assert [int(row[-1].replace(",", "")) for row in columns.values()] == sizes
    assert all(0 < row["mean_iou"] < 1 for row in results["rows"])

    for picture in ("predictions.png", "training.png", "sfa_20_selection.png"):
        with Image.open(out / picture) as image:
            assert min(image.size) > 100
    adapter = out / "sfa_20"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "SFA"
    assert "import sfa_peft" in (adapter / "README.md").read_text()


@pytest.mark.parametrize("make_data", [make_imagefolder, make_parquet])
def test_own_data_and_an_own_backbone_are_trained_on(
    make_data: Any,
    example: ModuleType,
    backbone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data, out, classes = make_data(tmp_path / "data"), tmp_path / "out", tmp_path / "names.json"
    classes.write_text(json.dumps({"classes": NAMES, "ignore_index": UNLABELLED}))
    options = ["--dataset_name", data, "--classes", classes, "--backbone", backbone]
    options += ["--methods", "sfa", "--budget", 0.2, "--image_size", 32, *SHORT]
    command(monkeypatch, *options, "--output_dir", out)

    example.main()

    printed = capsys.readouterr().out
    assert "same predictions" in printed
    assert list(table(printed)) == ["SFA 20%"]
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    assert row["trainable_share"] <= 0.2
    assert list(row["iou"]) == NAMES
    assert 0 <= row["mean_iou"] <= 1
    names = ["frozen", "full", "predictions.png", "sfa_20", "training.png"]
    assert [(out / name).exists() for name in names] == [False, False, True, True, True]


def test_training_starts_from_the_weights_of_the_backbone(
    example: ModuleType, backbone: Path
) -> None:
    model = example.make_model(example.Arguments(backbone=str(backbone)), len(NAMES))

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
        example.make_model(example.Arguments(backbone=str(tmp_path / name)), 3).backbone
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
        (["--methods", "sfa", "lora"], r"--methods: unknown ['lora']; choose from"),
        (["--split", "dev"], "--split: invalid choice: 'dev'"),
        (["--dataset_name", "no/such"], "--dataset_name no/such: no such folder"),
        (["--dataset_name", "no/such", "--classes", "names.json"], "Couldn't reach 'no/such'"),
        (["--dataset_name", ".", "--classes", "nothing.json"], "cannot read class names"),
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
        (lambda mask: mask, [], "holds class id 9, but there are 3 class names (ids 0 to 2)"),
        (change_ids, ["--ignore_index", UNLABELLED], "holds class id 7"),
        (lambda mask: mask.resize((20, 16)), ["--ignore_index", UNLABELLED], "must have one size"),
        (lambda mask: mask, ["--split", "test"], "the dataset has no such split"),
        (lambda mask: mask, ["--label_column_name", "depth"], "no column depth among"),
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
        "--methods", "sfa", "--output_dir", tmp_path / "out", *options,
    )  # fmt: skip

    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")

    assert message in str(stopped.value.code)
    written = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not written
